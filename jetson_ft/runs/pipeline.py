"""The way through the house: recipe -> rows -> tokens -> plan -> model and adapter ->
training -> adapter -> comparison -> report. Runs inside the worker process."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft import hub
from jetson_ft.data import lengths, read, store, tokens
from jetson_ft.device import probe
from jetson_ft.device.monitor import Monitor
from jetson_ft.device.probe import Device
from jetson_ft.device.telemetry import Telemetry
from jetson_ft.errors import UserError
from jetson_ft.models import adapter, libraries, load, resolve, shapes
from jetson_ft.models.load import Weights
from jetson_ft.models.resolve import Base
from jetson_ft.paths import disk_errors, read_json, write_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs import report, shortage
from jetson_ft.runs.jobs import check_only_longer
from jetson_ft.runs.rundir import Log, Run
from jetson_ft.training.group import Group

if TYPE_CHECKING:
    from datasets import Dataset

    from jetson_ft.training.checkpoint import Progress
    from jetson_ft.training.planner import Plan, Work


@dataclass(frozen=True)
class Rows:
    """Data of a run, read and tokenised."""

    tokenizer: Any
    train: Dataset
    heldout: Dataset
    heldout_messages: Dataset
    report: dict[str, Any]  # for data.json and report.json

    @property
    def heldout_characters(self) -> int:
        """Characters of all held-out answers."""
        return int(sum(self.heldout["answer_characters"]))


def prepare_rows(recipe: Recipe, base: Base) -> Rows:
    """Reads, splits and tokenises; everything is cached by content."""
    tokenizer = load.load_tokenizer(base)
    data = recipe.data
    train, heldout, split = store.split(
        read.resolve(data.train),
        data.heldout,
        layout=data.format,
        encoding=data.encoding,
        bad_rows=data.bad_rows,
    )
    identity = _identity(recipe, split)
    train_ids, train_report = tokens.tokenise(
        train, f"{identity}-train", tokenizer, data.max_length, data.over_length
    )
    heldout_ids, heldout_report = tokens.tokenise(
        heldout, f"{identity}-heldout", tokenizer, data.max_length
    )
    about = {
        "sha256": identity,
        "train": train_report.as_json(),
        "heldout": heldout_report.as_json(),
        "read": asdict(split),
    }
    return Rows(tokenizer, train_ids, heldout_ids, _those(heldout, heldout_ids), about)


def work_of(recipe: Recipe, weights: Weights, base: Base, rows: Rows) -> Work:
    """The training as the planner sees it; of the model only its config is read."""
    from jetson_ft.training.planner import Work

    return Work(
        shape=shapes.of(base),
        weights=weights,
        lora=recipe.lora,
        train=recipe.train,
        lengths=lengths.of(rows.train),
        heldout_tokens=float(tokens.token_counts(rows.heldout).sum()),
    )


def weights_of(recipe: Recipe, device: Device) -> Weights:
    """How the device would keep the recipe's frozen weights."""
    return Weights(device.precision(recipe.precision), recipe.quantize, recipe.double_quantize)


def _identity(recipe: Recipe, split: store.SplitInfo) -> str:
    """Tells whether two runs would train and measure on the same rows."""
    data = recipe.data
    parts = [
        split.train.sha256, split.heldout.sha256 if split.heldout else data.heldout,
        data.format, data.encoding, data.bad_rows,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _those(rows: Dataset, kept: Dataset) -> Dataset:
    """The rows whose numbers are among the kept ones."""
    numbers = set(kept["row"])
    return rows.select([index for index, number in enumerate(rows["row"]) if number in numbers])


class _Stopped(Exception):
    """Somebody asked the run to stop; what is worth keeping is in a checkpoint."""


class Pipeline:
    """One attempt at a run."""

    def __init__(
        self, run: Run, log: Log, stop_requested: Callable[[], bool], group: Group | None = None
    ) -> None:
        self.run, self.log = run, log
        self.recipe = run.recipe()
        self.stop_requested = stop_requested
        self.group = group or Group()
        self.monitor = self._monitor()

    def _monitor(self) -> Monitor:
        """Of this machine, by its first process."""
        if not self.group.leads:
            return Monitor()
        return Monitor(Telemetry(gpus=self.group.local_size), self.log.emit)

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """Announces a phase, and how long it took; a run asked to stop begins no more."""
        if self.group.any(self.stop_requested()):
            raise _Stopped
        started = time.monotonic()
        self.log.emit("phase", name=name, detail=detail)
        yield
        self.log.emit("phase_end", name=name, seconds=round(time.monotonic() - started, 3))

    def finetune(self) -> bool:
        """Everything from the recipe to the report.

        Returns:
            Whether it came to its end; False when it was asked to stop.
        """
        try:
            with self.monitor, hub.telling(self._on_download):
                self._finetune()
        except _Stopped:
            return False
        return True

    def _on_download(self, file: str, done: int, total: int, left: float | None) -> None:
        if self.group.size == 1 and self.stop_requested():  # others would wait for this one
            raise _Stopped
        self.log.emit("download", file=file, done=done, total=total, seconds_left=left)

    def _finetune(self) -> None:
        with self.phase("libraries"):
            libraries.load("datasets", "jetson_ft.training.trainer")
            from jetson_ft.models import fused
        with self.phase("device"):
            device = probe.probe()
            weights = weights_of(self.recipe, device)
            self._announce_processes()
            self.log.emit("device", device=device.as_json(), precision=weights.precision)
        with self.phase("model files", self.recipe.model):
            base = resolve.resolve(self.recipe.model)
        with self.phase("data", self.recipe.data.train):
            rows = self._rows(base)
            self._check_same_on_all(weights, base, rows)
            self.log.emit("data", **rows.report)
        with self.phase("plan"):
            work = shortage.within_grant(self.run, work_of(self.recipe, weights, base, rows))
            plan = self._plan(work, device)
        with self.phase("model", f"{base.name} as {weights}"):
            model = load.load_model(base, weights, device.kind)
            model = adapter.attach(model, self.recipe.lora, self.recipe.train.seed)
            self.log.emit("weights", bytes=load.bytes_per_part(model), fused=fused.fuse(model))
        with shortage.told(self.run, work, device, self.group):
            progress = self._train(model, rows, base, device, plan)
        if plan.shards == 1:  # else each is needed to the last reply
            if not self.group.is_first:
                return
            self.group = self.group.leave()
        with self.phase("comparison", "base and adapter on the held-out rows"), self.group.passes():
            found = self._compare(model, rows, progress)
        if not self.group.is_first:
            return
        self.group = self.group.leave()
        with self.phase("report"):
            self.monitor.stop()  # its last word belongs into the report
            report.write(self.run, self._facts(device, weights, rows, progress, found))

    def _rows(self, base: Base) -> Rows:
        """Made by each machine's first process; the others wait, and find them in the cache."""
        rows = prepare_rows(self.recipe, base) if self.group.leads else None
        if rows:
            self._check_same_lesson(rows)
        self.group.wait()
        return rows or prepare_rows(self.recipe, base)

    def _check_same_lesson(self, rows: Rows) -> None:
        """Refuses other rows or settings than the run began with (recipe.yaml can be edited)."""
        path = self.run.path / "data.json"
        if path.exists():
            began = read_json(path)
            check_only_longer(self.run, Recipe.model_validate(began["recipe"]), self.recipe)
            if began["sha256"] != rows.report["sha256"]:
                raise UserError(
                    "The data has changed since this run began; "
                    "going on would train on other rows.",
                    self.recipe.data.train,
                    "Put the old file back, or start a new run.",
                )
        write_json(path, {**rows.report, "recipe": self.recipe.model_dump()})

    def _announce_processes(self) -> None:
        if self.group.size > 1:
            group = self.group
            self.log.emit(
                "processes", rank=group.rank, size=group.size,
                hosts=group.hosts, backend=group.backend,
            )  # fmt: skip

    def _check_same_on_all(self, weights: Weights, base: Base, rows: Rows) -> None:
        """Other paths are fine, other contents are not."""
        own = {"output": "", "model": "", "data": self.recipe.data.model_copy(
            update={"train": "", "heldout": ""})}  # fmt: skip
        counts = tokens.token_counts(rows.train).tobytes()
        self.group.agree(
            {
                "the recipe": self.recipe.model_copy(update=own).to_yaml(),
                "the rows": rows.report["sha256"],
                "the rows' tokens": hashlib.sha256(counts).hexdigest(),
                "the model": base.fingerprint(),
                "the arithmetic": str(weights),
            }
        )

    # --- training ----------------------------------------------------------------------

    def _plan(self, work: Work, device: Device) -> Plan:
        """Refuses what can't fit before the model is loaded.

        Where it fits whole into some process no more, all share the frozen layers.
        """
        from jetson_ft.training import memory, planner

        flops = probe.measure_flops(device.kind, work.weights.precision) * self.group.size
        free = memory.with_own(device, self.group.local_size)
        whole = planner.best(work, free, flops)
        if not self.group.any(whole is None):
            return whole or planner.choose(work, free, flops)
        if work.weights.quantize == "none" and self.group.can_split(device.kind):
            work = replace(work, shards=self.group.size)
        return planner.frugal(self.group.gather(planner.choose(work, free, flops)))

    def _train(self, model: Any, rows: Rows, base: Base, device: Device, plan: Plan) -> Progress:
        """Trains, or takes up what an earlier attempt has finished."""
        from jetson_ft.training import sharding, trainer

        newest = self._newest_checkpoint() if self.group.is_first else None
        if plan.shards > 1:
            with self.phase("splitting", f"the layers among {plan.shards} processes"):
                sharding.split(model, self.group, device.kind)
        job = self._job(model, rows, device, plan)
        self.monitor.wait_for_first()
        with self.group.copy_of_firsts(newest) as resume:
            progress = self._fit(model, job, resume)
        if not progress.complete:
            raise _Stopped
        if self.group.is_first:
            self._export(model, rows, base, progress)
        if plan.shards > 1:  # all of them compare with what was exported
            self.group.align(trainer.trained(model))
        return progress

    def _newest_checkpoint(self) -> Path | None:
        from jetson_ft.training import checkpoint

        newest, faults = checkpoint.newest_intact(self.run.checkpoints)
        for fault in faults:
            self.log.emit("warning", message=f"{fault}; the checkpoint before it is used")
        return newest

    def _fit(self, model: Any, job: Any, newest: Path | None) -> Progress:
        from jetson_ft.models import attention
        from jetson_ft.models.loss import without_head
        from jetson_ft.training import trainer

        with self.phase("training"), without_head(model):
            packing = job.plan.micro_batch_tokens > 0
            with attention.packed(model) if packing else nullcontext():
                return trainer.fit(model, job, newest)

    def _job(self, model: Any, rows: Rows, device: Device, plan: Plan) -> Any:
        from jetson_ft.models import attention
        from jetson_ft.models.packing import packs
        from jetson_ft.training import trainer

        packing = attention.supports_packing(model)
        if not packing:
            plan = replace(plan, micro_batch_tokens=0)  # each row alone; none is longer
        counts = tokens.token_counts(rows.train)
        self._announce(plan, counts, packing)
        return trainer.Job(
            train_rows=rows.train,
            train_tokens=counts,
            heldout_packs=list(packs(list(rows.heldout), plan.micro_batch_tokens)),
            heldout_tokens=int(tokens.token_counts(rows.heldout).sum()),
            heldout_characters=rows.heldout_characters,
            recipe=self.recipe.train,
            plan=plan,
            checkpoints=self.run.checkpoints,
            device=device.kind,
            emit=self.log.emit,
            stop_requested=self.stop_requested,
            group=self.group,
            monitor=self.monitor,
            max_temperature=self.recipe.device.max_temperature_c,
        )

    def _announce(self, plan: Plan, counts: Any, packing: bool) -> None:
        from jetson_ft.training.schedule import plan_steps

        steps = len(plan_steps(counts, self.recipe.train))
        if self.group.leads:
            shortage.write_plan(self.run, plan, steps)
        self.log.emit("plan", **plan.as_json(), steps_at_most=steps, packing=packing)

    def _export(self, model: Any, rows: Rows, base: Base, progress: Progress) -> None:
        """Takes the best checkpoint's weights and writes them as the adapter."""
        from jetson_ft.training import checkpoint, trainer

        best = self.run.checkpoints / f"step-{progress.best_step}"
        fault = checkpoint.fault(best)
        if fault:
            self.log.emit("warning", message=f"{fault}; the adapter is the last step's instead")
        else:
            trainer.load_adapter(model, best)
            self.log.emit("best", step=progress.best_step, heldout_loss=progress.best_loss)
        model.eval()
        staging = self.run.path / ".adapter.tmp"
        with disk_errors(self.run.path), checkpoint.safetensors_errors():
            shutil.rmtree(staging, ignore_errors=True)
            adapter.save(model, rows.tokenizer, base, staging)
            shutil.rmtree(self.run.adapter, ignore_errors=True)
            staging.replace(self.run.adapter)

    # --- comparison and report -----------------------------------------------------------

    def _compare(self, model: Any, rows: Rows, progress: Progress) -> dict[str, Any]:
        from jetson_ft.inference import evaluate
        from jetson_ft.models.packing import packs

        plan = read_json(self.run.path / "plan.json")
        model.config.use_cache = True
        return evaluate.compare(
            model,
            rows.tokenizer,
            list(rows.heldout_messages["messages"]),
            list(packs(list(rows.heldout), plan["micro_batch_tokens"])),
            rows.heldout_characters,
            self.recipe.eval.max_new_tokens,
            self.recipe.eval.samples,
            self._on_compared,
            self._measured(progress),
        )

    def _measured(self, progress: Progress) -> dict[str, Any] | None:
        """The scores that training took of the base (step 0) and of the weights exported."""
        from jetson_ft.models.loss import Score

        found = {
            event["step"]: Score(event["heldout_loss"], event["bits_per_char"])
            for event in self.run.events()
            if event["kind"] == "eval"
        }
        sides = {"before": found.get(0), "after": found.get(progress.best_step)}
        return sides if all(sides.values()) else None

    def _on_compared(self, side: str, part: str, done: int, of: int) -> None:
        if self.group.any(self.stop_requested()):
            raise _Stopped
        if part == "replies":
            self.log.emit("compare", side=side, done=done, of=of)

    def _facts(
        self,
        device: Device,
        weights: Weights,
        rows: Rows,
        progress: Progress,
        found: dict[str, Any],
    ) -> dict[str, Any]:
        from jetson_ft.training.memory import peak_memory_bytes

        plan = read_json(self.run.path / "plan.json")
        return {
            "precision": str(weights),
            "data_sha256": rows.report["sha256"],
            "data": {key: rows.report[key] for key in ("train", "heldout")},
            "device": device.as_json(),
            "progress": asdict(progress),
            "peak_memory_bytes": peak_memory_bytes(device.kind),
            "plan": {key: plan[key] for key in ("peak_memory_bytes", "seconds")},
            **found,
        }
