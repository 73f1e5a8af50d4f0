"""One attempt at a run, inside the worker process. Read `Pipeline._finetune` from top to bottom:
recipe -> rows -> tokens -> plan -> model and adapter -> training -> comparison -> report.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from jetson_ft import adapter, events, hub
from jetson_ft.data import render_template, tokenize
from jetson_ft.data.prepare import PreparedRows, prepare_rows
from jetson_ft.errors import Message, UserError, _, joined, messages_as_json
from jetson_ft.events import Emit
from jetson_ft.files import disk_errors, quoted, staging_folder, write_json
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.hardware.monitor import Monitor
from jetson_ft.hardware.sensors.source import Telemetry
from jetson_ft.kernels import attention
from jetson_ft.models import fast_import, files, loading, positions
from jetson_ft.models.dims import ModelDims
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, weight_format
from jetson_ft.recipe import Recipe
from jetson_ft.runs import contract, disk, heldout, initial_adapter, oom
from jetson_ft.runs.contents import SCHEMA
from jetson_ft.runs.processes import explain_error
from jetson_ft.runs.report import card, summary
from jetson_ft.runs.store import Run
from jetson_ft.training import batches, checkpoint, memory, planner
from jetson_ft.training.cost_model import Workload, describe_workload
from jetson_ft.training.distributed import DistributedContext, shard_layers
from jetson_ft.training.planner import Plan
from jetson_ft.training.state import TrainState


class _Stopped(Exception):
    """A stop was requested; what is worth keeping is in a checkpoint."""


class Pipeline:
    """One attempt at a run; `stop_requested` is called between phases and after each step."""

    def __init__(
        self,
        run: Run,
        emit: Emit,
        stop_requested: Callable[[], bool],
        dist: DistributedContext | None = None,
    ) -> None:
        self.run, self.emit, self.stop_requested = run, emit, stop_requested
        self.recipe = run.recipe()
        self.dist = dist or DistributedContext()
        self.monitor = Monitor()
        if self.dist.is_local_main:  # one for each machine
            self.monitor = Monitor(Telemetry(gpus=self.dist.local_size), emit)

    def finetune(self) -> bool:
        """Do everything from the recipe to the report; return False when a stop was requested."""
        try:
            with (
                self.monitor,
                hub.download_progress(self._on_download),
                render_template.stop_check(self._on_rendering),
            ):
                self._finetune()
        except _Stopped:
            return False
        return True

    def _finetune(self) -> None:
        recipe, dist, emit = self.recipe, self.dist, self.emit
        with self.phase("libraries"):
            if dist.is_local_main:
                disk.remove_abandoned_files(self.run)
            fast_import.import_libraries("datasets", "jetson_ft.training.loop")
            from jetson_ft.kernels.fused_layers import fuse_layers
        with self.phase("device"):
            device = detect.detect_device()
            weights = weight_format(recipe, device)
            if dist.size > 1:
                emit(events.ProcessesConnected(
                    rank=dist.rank, size=dist.size, hosts=dist.hosts, backend=dist.backend
                ))  # fmt: skip
            emit(events.DeviceDetected(device=asdict(device), precision=weights.precision))
        with self.phase("model files", recipe.model):
            base = files.resolve_model(recipe.model)
        with self.phase("data", recipe.data.train_names()):
            rows = self._prepare_rows(base)
            self._assert_same_on_all_ranks(weights, base, rows)
            emit(events.DataPrepared(**rows.report))
            for notice in rows.report["train"]["notices"] + rows.report["heldout"]["notices"]:
                emit(events.Warned.of_message(Message.from_json(notice)))
            if warning := positions.check_longest_row(base, rows.longest):
                emit(events.Warned.of_message(warning))
        with self.phase("plan"):
            workload = describe_workload(recipe, weights, base, rows)
            if dist.is_local_main and (fault := self.run.set_damaged_plan_aside()):
                self._warn(_("{fault} It is computed again."), fault)
            workload = oom.limit_memory(self.run, workload)
            plan = self._choose_plan(workload, device)
            self._store_plan(oom.plan_as_json(workload, plan, device))
            self._require_checkpoint_space(workload.dims)
        with self.phase("model", f"{base.name} as {weights}"):
            model = loading.load_model(base, weights, device.kind)
            self._turn_off_base_dropout(model)
            model = adapter.attach_adapter(model, recipe.lora, recipe.train.seed)
            if recipe.lora.initial_adapter:
                initial_adapter.load_into(model, self.run, base)
            fused = fuse_layers(model)
            coverage = workload.coverage
            emit(events.WeightsLoaded(
                bytes=loading.bytes_per_part(model), fused=fused,
                adapter_parameters=coverage.adapter_parameters,
                adapted_share=coverage.adapted_share, quantized_share=coverage.quantized_share,
            ))  # fmt: skip
            for note in coverage.notes:
                emit(events.Warned.of_message(note))
        if plan.shards > 1:
            with self.phase("sharding", f"the layers among {plan.shards} processes"):
                shard_layers(model, dist, device.kind)
        obstacle = self._packing_obstacle(model, rows)
        packing = not dist.any_rank(obstacle is not None)
        if not packing:  # no row is longer than the planned micro-batch
            plan = replace(plan, micro_batch_tokens=0)  # one row each
            self._store_plan(oom.plan_as_json(workload, plan, device))
        state = self._train(model, rows, device, plan, packing)
        if not state.is_complete or state.evaluation_due:
            raise _Stopped
        exported_step = self._export_adapter(model, rows, base, plan, state)
        if plan.shards == 1:  # sharded: all ranks must take part in the comparison
            if not dist.is_main:
                return
            self.dist = dist = dist.close()
        detail = "base and adapter on the held-out rows"
        with self.phase("comparison", detail):
            comparison = self._try_to_compare(model, rows, workload, device, plan)
        if not dist.is_main:
            return
        self.dist = dist.close()
        with self.phase("report"):
            self.monitor.stop()  # its last event belongs into the report
            heldout.write_rows(self.run, comparison.pop("rows", []))
            report = summary.build_report(
                self.run,
                plan,
                state,
                exported_step,
                precision=str(weights),
                data_sha256=rows.report["sha256"],
                data={
                    "train": rows.report["train"],
                    "heldout": rows.report["heldout"],
                    "sources": rows.source_table(),
                },
                device=asdict(device),
                initial_adapter=initial_adapter.source_of(self.run),
                **comparison,
            )
            summary.write_report(self.run, report)
            card.write_card(self.run, self.run.adapter)

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Emit the start and the end of a phase; raise `_Stopped` if a stop was requested."""
        if self.dist.any_rank(self.stop_requested()):
            raise _Stopped
        started = time.monotonic()
        self.emit(events.PhaseStarted(name=name, detail=detail))
        yield
        self.emit(events.PhaseEnded(name=name, seconds=round(time.monotonic() - started, 3)))

    def _on_download(self, file: str, done: int, total: int, left: float | None) -> None:
        if self.dist.size == 1 and self.stop_requested():  # other ranks would wait for this one
            raise _Stopped
        self.emit(events.Download(file=file, done=done, total=total, seconds_left=left))

    def _on_rendering(self) -> None:
        if self.dist.size == 1 and self.stop_requested():  # as above
            raise _Stopped

    def _warn(self, template: str, fault: Message | None) -> None:
        self.emit(events.Warned.of_message(Message(template, {"fault": fault})))

    def _prepare_rows(self, base: BaseModelFiles) -> PreparedRows:
        """Prepare the rows on each machine's first rank; the others take them from the cache.

        Raises:
            UserError: on every rank, the rows can't be used on one of them, or a resumed run has
                other settings, rows or another base than before.
        """
        tokenizer = loading.load_tokenizer(base, self.recipe.data.chat_template)
        rows, fault = None, None
        if self.dist.is_local_main:
            try:
                rows = self._prepare_checked_rows(base, tokenizer)
            except UserError as error:
                fault = error
        self._raise_on_all_ranks(fault)
        return rows or prepare_rows(self.recipe.data, tokenizer)

    def _raise_on_all_ranks(self, fault: UserError | None) -> None:
        """Raise an error of any rank on every rank, which would else wait for that one."""
        if faults := [each for each in self.dist.gather(fault) if each]:
            raise fault or faults[0]

    def _require_checkpoint_space(self, dims: ModelDims) -> None:
        """Raise `DiskFull` on every rank if rank 0 has no space: it alone writes checkpoints."""
        fault = None
        if self.dist.is_main:
            try:
                disk.require_checkpoint_space(self.recipe, dims, self.run)
            except UserError as error:
                fault = error
        self._raise_on_all_ranks(fault)

    def _prepare_checked_rows(self, base: BaseModelFiles, tokenizer: Any) -> PreparedRows:
        """Prepare the rows, compare all with the last attempt, and write `data.json`."""
        last = self.run.last_data()
        described = contract.describe_base(base, tokenizer)
        if last:  # recipe.yaml may have been edited since
            old = Recipe.model_validate(last["recipe"])
            contract.check_only_longer(self.run, old, self.recipe)
            if last.get("base"):  # not in runs of older versions
                contract.check_base(self.run, last["base"], described, base)
        rows = prepare_rows(self.recipe.data, tokenizer)
        ids_sha256 = contract.token_ids_sha256(rows)
        if last:
            contract.check_rows(self.run, last, rows, ids_sha256)
        content = {**rows.report, "recipe": self.recipe.model_dump()}
        content |= {"base": described, "token_ids_sha256": ids_sha256}
        write_json(self.run.path / "data.json", content)
        return rows

    def _assert_same_on_all_ranks(
        self, weights: WeightFormat, base: BaseModelFiles, rows: PreparedRows
    ) -> None:
        """Refuse machines that would train something else; paths may differ."""
        recipe = self.recipe.model_copy(deep=True)
        recipe.output_dir = recipe.model = recipe.data.heldout = ""
        recipe.data.rename_sources(lambda _name: "")
        recipe.data.chat_template = str(rows.tokenizer.chat_template)
        recipe.lora.initial_adapter = None
        counts = tokenize.token_counts(rows.train).tobytes()
        self.dist.assert_same_on_all_ranks(
            {
                "the recipe": recipe.to_yaml(),
                "the rows": rows.report["sha256"],
                "the rows' tokens": hashlib.sha256(counts).hexdigest(),
                "the model": base.fingerprint(),
                "the arithmetic": str(weights),
                "the initial adapter": (initial_adapter.source_of(self.run) or {}).get("sha256"),
            }
        )

    def _choose_plan(self, workload: Workload, device: Device) -> Plan:
        """Choose a plan that fits every rank, before the model is loaded.

        Where some rank can't hold the whole model, all ranks share the frozen layers.
        """
        dist = self.dist
        flops = detect.measure_flops(device.kind, workload.weights.precision) * dist.size
        free = memory.with_own_memory(device, dist.local_size)
        whole = planner.best_plan(workload, free, flops)
        if not dist.any_rank(whole is None):
            assert whole
            return whole
        if workload.weights.quantize == "none" and dist.can_shard(device.kind):
            workload = replace(workload, shards=dist.size)
        return planner.min_memory_plan(dist.gather(planner.choose_plan(workload, free, flops)))

    def _turn_off_base_dropout(self, model: Any) -> None:
        """Turn the base model's own dropout off, which would depend on the plan; say so."""
        from jetson_ft.kernels.dropout import turn_off_base_dropout

        if shares := turn_off_base_dropout(model):
            text = _(
                "The base model's own dropout ({shares}) is off; lora.dropout is the adapter's."
            )
            listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            self.emit(events.Warned.of_message(Message(text, {"shares": listed})))

    def _store_plan(self, changes: dict[str, Any]) -> None:
        """Write `plan.json`, on each machine once; keep its other keys.

        The last attempt's `memory_limit_gb` is one of them (`train.on_oom: shrink`).
        """
        if self.dist.is_local_main:
            content = {**self.run.plan(), "schema": SCHEMA, **changes}
            write_json(self.run.path / "plan.json", content)

    def _packing_obstacle(self, model: Any, rows: PreparedRows) -> Message | None:
        """Return why rows can't be packed, after a warning that says so; None: they can."""
        from jetson_ft.kernels.attention_trial import packing_obstacle

        if obstacle := packing_obstacle(model, rows.longest):
            text = _(
                "With this model rows are computed one by one, which is slower than packed: "
                "{obstacle}."
            )
            self.emit(events.Warned.of_message(Message(text, {"obstacle": obstacle})))
        return obstacle

    def _train(
        self, model: Any, rows: PreparedRows, device: Device, plan: Plan, packing: bool
    ) -> TrainState:
        """Train from the newest intact checkpoint, or return the state of a complete run."""
        from jetson_ft.kernels.lm_head_loss import chunked_lm_head
        from jetson_ft.training import loop

        newest = None
        if self.dist.is_main:
            newest, faults = checkpoint.newest_intact(self.run.checkpoints)
            for fault in faults:
                self._warn(_("{fault}; the checkpoint before it is used"), fault)
        job = loop.TrainingJob(
            train_rows=rows.train,
            train_tokens=tokenize.token_counts(rows.train),
            heldout_rows=list(rows.heldout),
            heldout_characters=rows.heldout_characters,
            recipe=self.recipe.train,
            plan=plan,
            checkpoints=self.run.checkpoints,
            device=device.kind,
            emit=self.emit,
            stop_requested=self.stop_requested,
            dist=self.dist,
            monitor=self.monitor,
            max_temperature=self.recipe.device.max_temperature_c,
            loraplus_lr_ratio=self.recipe.lora.loraplus_lr_ratio,
        )
        steps = len(batches.plan_steps(job.train_tokens, job.recipe))
        self._store_plan({"steps": steps})
        self.emit(events.Planned(**plan.as_json(), steps_at_most=steps, packing=packing))
        self.monitor.wait_for_reading()
        packed_attention = attention.use_packed_attention(model) if packing else nullcontext()
        with (
            self.dist.broadcast_directory(newest) as resume,
            self.phase("training"),
            chunked_lm_head(model),
            packed_attention,
        ):
            return loop.train(model, job, resume)

    def _export_adapter(
        self, model: Any, rows: PreparedRows, base: BaseModelFiles, plan: Plan, state: TrainState
    ) -> int:
        """Write the best checkpoint's weights as the run's adapter; return its step.

        Rank 0 alone writes, and knows whether that checkpoint is damaged.
        """
        from jetson_ft.training import loop

        exported_step = state.step
        if self.dist.is_main:
            best = self.run.checkpoints / f"step-{state.best_step}"
            fault = checkpoint.find_fault(best)
            if state.best_step is None or fault:
                self._warn(_("{fault}; the adapter is the last step's instead"), fault)
            else:
                checkpoint.load_adapter_weights(model, best)
                exported_step = state.best_step
                self.emit(events.BestSelected(step=state.best_step, heldout_loss=state.best_loss))
            model.eval()
            with (
                disk_errors(self.run.path),
                checkpoint.safetensors_errors(),
                staging_folder(self.run.adapter) as staging,
            ):
                adapter.save_adapter(model, rows.tokenizer, base, staging / "adapter")
                shutil.rmtree(self.run.adapter, ignore_errors=True)
                (staging / "adapter").replace(self.run.adapter)
        if plan.shards > 1:  # every rank compares with what was exported
            self.dist.broadcast_parameters(loop.trainable_parameters(model))
        return exported_step

    def _try_to_compare(self, *arguments: Any) -> dict[str, Any]:
        """Return the comparison's part of the report, or why it failed: the rest is not lost."""
        try:
            with self.dist.collective_errors():
                return self._compare(*arguments)
        except _Stopped:
            raise
        except Exception as error:
            traceback.print_exc()
            fix = _("If it fails again, report it with log.txt from the run's folder.")
            fault = explain_error(error, Message(fix))
            again = _(
                "The adapter is not compared with the base: {fault} "
                "`jetson-ft eval {run}` compares them."
            )
            values = {"fault": joined([fault.what, fault.fix], " "), "run": quoted(self.run.name)}
            warning = Message(again, values)
            self.emit(events.Warned.of_message(warning))
            return {
                "eval": None,
                "generation": None,
                **messages_as_json(comparison_error=warning),
            }

    def _compare(
        self,
        model: Any,
        rows: PreparedRows,
        workload: Workload,
        device: Device,
        plan: Plan,
    ) -> dict[str, Any]:
        from jetson_ft.inference import compare
        from jetson_ft.inference.reader import ModelReader

        # Rank 0 decides: another machine may be of another kind.
        (device, *_) = self.dist.gather(device)
        model.config.use_cache = True
        batch_size = partial(planner.reply_batch_size, workload, device, plan)
        reader = ModelReader(model, rows.tokenizer, plan.micro_batch_tokens, batch_size)
        return compare.compare_adapter(
            compare.adapter_sides(reader),
            rows.tokenizer,
            list(rows.heldout_messages),
            list(rows.heldout),
            self.recipe.eval.max_new_tokens,
            self.recipe.eval.samples,
            self._on_compared,
            self.recipe.data.max_length,
        )

    def _on_compared(self, side: str, part: str, done: int, total: int) -> None:
        if self.dist.any_rank(self.stop_requested()):
            raise _Stopped
        if part != "tokens":
            self.emit(events.Generated(side=side, part=part, done=done, total=total))
