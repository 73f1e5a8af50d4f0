"""LoRA training on transformers' Trainer.

One item of the data loader is one whole optimizer step: the rows that form it, packed into
micro-batches. So the loss is normalised over all tokens of the step however they are split,
and a resumed run repeats exactly the steps it lost. Trainer brings the loop, the optimizer,
clipping and the process group; checkpoints, schedule and measurements are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from jetson_ft.data.tokens import supervised_counts
from jetson_ft.device.monitor import Monitor
from jetson_ft.errors import UserError
from jetson_ft.models.loss import Score, score, token_losses
from jetson_ft.models.packing import Pack, packs
from jetson_ft.recipe import TrainRecipe
from jetson_ft.training import checkpoint, schedule, sharding
from jetson_ft.training.checkpoint import Progress
from jetson_ft.training.group import Group
from jetson_ft.training.heat import Heat
from jetson_ft.training.memory import peak_memory_bytes
from jetson_ft.training.planner import Plan

if TYPE_CHECKING:
    from datasets import Dataset

# fp16 gradients below 6e-8 vanish; this factor lifts them, and is taken out again in fp32.
_FP16_LOSS_SCALE = 1024.0

Emit = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """What a training needs besides the model.

    `emit(kind, **fields)` receives an event a step, measurement and checkpoint;
    `stop_requested` is asked once a step.
    """

    train_rows: Dataset
    train_tokens: schedule.Array  # tokens of each row
    heldout_packs: list[Pack]
    heldout_tokens: int
    heldout_characters: int
    recipe: TrainRecipe
    plan: Plan
    checkpoints: Path
    device: str
    emit: Emit
    stop_requested: Callable[[], bool]
    group: Group = field(default_factory=Group)
    monitor: Monitor = field(default_factory=Monitor)
    max_temperature: float = 0.0  # degrees Celsius; 0: no limit
    share: bool = True  # what the rows of a pack begin with is held once


@dataclass(frozen=True)
class Stock:
    """What all processes know alike after a step."""

    seconds: float  # of the step, as the first process took them
    since_saved: float
    stop: bool  # whether any of them was asked to
    joules: float | None  # of all machines; None: one of them doesn't know


@dataclass(frozen=True)
class Step:
    """An optimizer step: this process's micro-batches of it, and the counts of all of it."""

    packs: list[Pack]
    rows: int
    tokens: int
    supervised: int


class _Steps(torch.utils.data.Dataset[Step]):
    """Planned optimizer steps, each as its micro-batches."""

    def __init__(self, job: Job, steps: list[schedule.Array]) -> None:
        self.job, self.steps = job, steps
        self.supervised = supervised_counts(job.train_rows)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Step:
        job, step = self.job, self.steps[number]
        lengths = job.train_tokens[step]
        mine = step[schedule.share(lengths, job.group.rank, job.group.size)]
        chosen = job.train_rows.select_columns(["input_ids", "parts"]).select(mine)
        return Step(
            packs=list(packs(list(chosen), job.plan.micro_batch_tokens, share=job.share)),
            rows=len(step),
            tokens=int(lengths.sum()),
            supervised=int(self.supervised[step].sum()),
        )


class LoraTrainer(Trainer):
    """Trains the adapter of a PEFT model; `fit` is the way in."""

    def __init__(self, model: Any, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        self.steps = schedule.plan_steps(job.train_tokens, job.recipe)
        self.step_tokens = [sum(int(job.train_tokens[i]) for i in step) for step in self.steps]
        self.rates: list[float] = []  # tokens per second, of each step of this attempt
        self.settle_length()
        self.heat = Heat(job.max_temperature, job.monitor, job.group, job.emit, job.stop_requested)
        self._step_started = 0.0
        self._saved_at = time.monotonic()
        super().__init__(
            model=model,
            args=self._arguments(),
            train_dataset=_Steps(job, self.steps),
            data_collator=_only_item,
            callbacks=[_Steering(self)],
        )

    def _arguments(self) -> TrainingArguments:
        train = self.job.recipe
        return TrainingArguments(
            output_dir=str(self.job.checkpoints),
            per_device_train_batch_size=1,  # one optimizer step
            max_steps=self.progress.total_steps or len(self.steps),
            train_sampling_strategy="sequential",  # `schedule` has shuffled the rows
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim="adamw_torch_fused",
            seed=train.seed + self.job.group.rank,  # each drops out other activations
            use_cpu=self.job.device == "cpu",
            gradient_checkpointing=self.job.plan.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ignore_data_skip=False,
        )

    def settle_length(self) -> bool:
        """Fixes the number of steps, and again only for a run that was made longer.

        Under `max_minutes` that takes some timed steps. Returns whether it was done.
        """
        progress, train = self.progress, self.job.recipe
        wanted = [train.epochs, train.max_steps, train.max_minutes]
        total = len(self.steps)
        if progress.settled_for == wanted:
            return False
        if train.max_minutes:
            if progress.step < min(schedule.MEASURED_STEPS, total):
                return False
            total = schedule.steps_within(
                self.step_tokens, progress.step, self._usual_speed(), train.max_minutes
            )
        progress.total_steps = max(total, progress.total_steps or 0)
        progress.settled_for = wanted
        progress.eval_every = train.eval_every or schedule.choose_eval_every(
            self.step_tokens, self.job.heldout_tokens, progress.total_steps
        )
        progress.stopped_early, progress.evals_without_gain = False, 0
        return True

    def start_step(self) -> None:
        """Starts what counts optimizer steps alone."""
        self._step_started = time.monotonic()
        self.job.monitor.meter.start(self._step_started)

    def take_stock(self) -> Stock:
        """Ends a step, so that all processes decide alike what comes next."""
        group, now = self.job.group, time.monotonic()
        joules = self.job.monitor.meter.stop(now)
        first, leads = float(group.is_first), float(group.leads)
        seconds, since_saved, stops, energy, unknown = group.sum(
            [
                first * (now - self._step_started),
                first * (now - self._saved_at),
                float(self.job.stop_requested()),
                leads * (joules or 0.0),
                leads * (joules is None),
            ]
        )
        return Stock(seconds, since_saved, stops > 0, None if unknown else energy)

    def _usual_speed(self) -> float:
        """Of the median step: the first loads kernels, and other programs slow down some."""
        return median(self.rates) if self.rates else self._speed()

    def _speed(self) -> float:
        """Tokens per second so far."""
        return self.progress.tokens / max(1e-9, self.progress.train_seconds)

    # --- Trainer's own points of extension -------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The recipe's schedule over the number of steps, which may be settled later."""
        self.lr_scheduler: LambdaLR = LambdaLR(optimizer or self.optimizer, self._rate_factor)
        return self.lr_scheduler

    def _rate_factor(self, step: int) -> float:
        return schedule.rate_factor(step, self.progress.total_steps, self.job.recipe)

    def training_step(
        self, model: Any, inputs: Step, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward over all micro-batches of a step; its mean loss in nats.

        Loss and gradients are sums over the processes, each over the tokens of the whole step.
        """
        model.train()
        scale = _FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0
        total = torch.zeros((), device=self.args.device)
        with self.job.group.passes():
            idle = self._idle_passes(len(inputs.packs))
            for pack in inputs.packs:
                total += self._pass(model, pack, inputs.supervised, scale)
            for pack in idle:
                self._pass(model, pack, 1, 0.0)
        if scale != 1.0:
            _unscale(model, scale)
        (loss_of_all,) = self.job.group.sum([float(total)])
        if not math.isfinite(loss_of_all):
            raise _diverged("loss", self.progress.step + 1, self.job)
        self.job.group.add_gradients(trained(model))
        self._count(inputs)
        return total.fill_(loss_of_all)

    def _pass(self, model: Any, pack: Pack, supervised: int, scale: float) -> torch.Tensor:
        """Forward and backward over a micro-batch; its part of the mean loss.

        A function of its own, so that its graph is gone before the next one's: bitsandbytes' int8
        layers hold their inputs in it even after the backward pass.
        """
        loss = token_losses(model, pack.to(self.args.device)).sum() / supervised
        (loss * scale).backward()
        return loss.detach()

    def _idle_passes(self, busy: int) -> list[Pack]:
        """What this process passes through split layers while another is still busy."""
        if self.job.plan.shards == 1:
            return []
        return [sharding.idle_pack()] * (self.job.group.most(busy) - busy)

    def _count(self, step: Step) -> None:
        self.progress.supervised_tokens += step.supervised
        self.progress.tokens += step.tokens
        self.progress.rows += step.rows

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer's own; an infinite one ends the run before it can ruin the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            raise _diverged("gradient", self.progress.step + 1, self.job)
        return norm

    def _prepare_inputs(self, inputs: Step) -> Step:
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer's formula is for full training of padded batches."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One event a step."""
        if "loss" not in logs:
            return
        progress = self.progress
        self.job.emit(
            "step",
            step=progress.step,
            total_steps=progress.total_steps,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=progress.tokens,
            tokens_per_second=self._speed(),
            seconds_left=self.seconds_left(),
            memory=peak_memory_bytes(self.job.device),
        )
        stopped = self.control.should_training_stop and progress.step != progress.total_steps
        # After the first step: whoever waits sees that it can be made half a minute earlier.
        if progress.step == 1 and not stopped:
            with self.model.disable_adapter():
                self.measure(step=0)

    def seconds_left(self) -> float | None:
        """Seconds of training to go at the speed so far; None while it can't be known."""
        progress = self.progress
        if progress.total_steps is None or progress.tokens == 0:
            return None
        return sum(self.step_tokens[progress.step : progress.total_steps]) / self._speed()

    def _evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        result = self.measure()
        if not math.isfinite(result.loss):
            raise _diverged("held-out loss", self.progress.step, self.job)
        # Trainer looks at these after a step and again after the last one.
        self.control.should_evaluate, self.control.should_save = False, True
        progress, patience = self.progress, self.job.recipe.early_stopping
        if progress.best_loss is None or result.loss < progress.best_loss:
            progress.best_loss, progress.best_step = result.loss, progress.step
            progress.evals_without_gain = 0
        else:
            progress.evals_without_gain += 1
            if patience and progress.evals_without_gain >= patience:
                progress.stopped_early = self.control.should_training_stop = True
        return {}

    def measure(self, step: int | None = None) -> Score:
        """Scores the held-out rows and emits the result, as of the step made last.

        As of step 0 with the adapter switched off, which is the same as before training.
        """
        started = time.monotonic()
        job = self.job
        mine = job.heldout_packs[job.group.rank :: job.group.size]
        mine += self._idle_passes(len(mine))
        with job.group.passes():
            result = score(self.model, mine, job.heldout_characters, job.group.sum)
        self.job.emit(
            "eval",
            step=self.progress.step if step is None else step,
            heldout_loss=result.loss,
            bits_per_char=result.bits_per_char,
            seconds=time.monotonic() - started,
        )
        return result

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Trainer's own; then everything of the step is told and saved, and the board may cool."""
        super()._maybe_log_save_evaluate(*args, **options)
        if not self.control.should_training_stop and self.heat.wait(self.progress.step):
            self._save_checkpoint(self.model)
            self.control.should_training_stop = True

    # --- checkpoints -------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        started = time.monotonic()
        self.control.should_save = False
        if not self.job.group.is_first:
            return
        folder = checkpoint.write(self.job.checkpoints, self.progress, self._save_files)
        checkpoint.rotate(self.job.checkpoints, self.job.recipe.keep_checkpoints, self.progress)
        self._saved_at = time.monotonic()
        self.job.emit(
            "checkpoint",
            step=self.progress.step,
            path=str(folder),
            seconds=self._saved_at - started,
        )

    def _save_files(self, folder: Path) -> None:
        self.model.save_pretrained(folder, safe_serialization=True)
        optimizer = checkpoint.optimizer_tensors(self.optimizer)
        checkpoint.save_tensors(folder / "optimizer.safetensors", optimizer)
        checkpoint.save_tensors(folder / "random.safetensors", checkpoint.random_states())
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str) -> None:
        tensors = checkpoint.load_tensors(Path(checkpoint_folder) / "optimizer.safetensors")
        checkpoint.restore_optimizer(self.optimizer, tensors)
        self.lr_scheduler.last_epoch = self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._rate_factor(self.progress.step)

    def _load_scaler(self, checkpoint_folder: str) -> None:
        """No scaler: fp16 uses a constant factor."""

    def _load_rng_state(self, checkpoint_folder: str) -> None:
        if self.job.group.is_first:
            states = checkpoint.load_tensors(Path(checkpoint_folder) / "random.safetensors")
            checkpoint.restore_random_states(states)


class _Steering(TrainerCallback):
    """Decides after each step whether to measure, to save, or to stop."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self.trainer.start_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Counts the step and settles what happens next."""
        trainer, progress = self.trainer, self.trainer.progress
        train = trainer.job.recipe
        progress.step = state.global_step
        stock = trainer.take_stock()
        progress.take(stock.seconds, stock.joules)
        tokens = trainer.step_tokens[progress.step - 1]
        trainer.rates.append(tokens / max(1e-9, stock.seconds))
        trainer.job.monitor.step = progress.step
        settled = trainer.settle_length()
        if settled:
            self._announce_length(state)
        control.should_training_stop = progress.step == progress.total_steps
        every = progress.eval_every or 0
        control.should_evaluate = not stock.stop and (
            control.should_training_stop or (every > 0 and progress.step % every == 0)
        )
        # A length once settled is stored at once: a resumed run must not settle another.
        due = stock.since_saved > 60 * train.checkpoint_minutes
        control.should_save = stock.stop or settled or due
        control.should_training_stop |= stock.stop

    def _announce_length(self, state: Any) -> None:
        trainer, progress = self.trainer, self.trainer.progress
        state.max_steps = progress.total_steps
        trainer.job.emit("length", step=progress.step, total_steps=progress.total_steps,
                         seconds_left=trainer.seconds_left())  # fmt: skip


def fit(model: Any, job: Job, resume: Path | None = None) -> Progress:
    """Trains, from the start or from a checkpoint, until complete or asked to stop.

    Returns:
        The counters; `best_step` names the checkpoint to take.

    Raises:
        UserError: the loss became infinite, or a checkpoint couldn't be written.
    """
    progress = checkpoint.read_progress(resume) if resume else Progress()
    job.monitor.step = progress.step
    trainer = LoraTrainer(model, job, progress)
    if job.plan.checkpointing:
        model.enable_input_require_grads()
    model.config.use_cache = False
    job.group.align(trained(model))
    if resume and progress.complete:
        load_adapter(model, resume)
        return progress
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return progress


def load_adapter(model: Any, folder: Path) -> None:
    """Puts a checkpoint's adapter weights into a model that has such an adapter."""
    from peft import set_peft_model_state_dict

    weights = checkpoint.load_tensors(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, weights)


def trained(model: Any) -> list[Any]:
    """The adapter's parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _only_item(batch: list[Step]) -> Step:
    return batch[0]


def _unscale(model: Any, scale: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale


def _diverged(what: str, step: int, job: Job) -> UserError:
    return UserError(
        f"The {what} became infinite at step {step}; training has stopped. "
        "The last good checkpoint is kept.",
        str(job.checkpoints),
        f"Lower the rate (--set train.learning_rate={job.recipe.learning_rate / 4:g}), raise "
        "train.warmup_steps, or use `precision: bf16` or `fp32` instead of fp16.",
    )
