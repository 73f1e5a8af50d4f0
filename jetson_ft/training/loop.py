"""LoRA training: one plain loop over optimizer steps. Read `train` from top to bottom.

A step is a set of whole rows (`batches`), packed into micro-batches. The loss is normalised over
all supervised tokens of the step, so that it doesn't depend on how the step is split, and a
resumed run repeats exactly the steps it lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jetson_ft.data.chat_template import END
from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import CheckpointSaved, Emit, Evaluated, Step, TotalSteps
from jetson_ft.hardware.monitor import Monitor
from jetson_ft.kernels.dropout import use_dropout_keys
from jetson_ft.kernels.lm_head_loss import score_packs, token_losses
from jetson_ft.kernels.packing import Pack, make_packs, pack_rows
from jetson_ft.recipe import TrainRecipe
from jetson_ft.training import batches, checkpoint
from jetson_ft.training.batches import StepBatch
from jetson_ft.training.distributed import DistributedContext
from jetson_ft.training.memory import peak_memory_bytes
from jetson_ft.training.planner import Plan
from jetson_ft.training.state import StepStats, TrainState
from jetson_ft.training.thermal import ThermalGuard

if TYPE_CHECKING:
    from datasets import Dataset

# Loss scale for fp16, whose gradients underflow below 6e-8; the fp32 gradients of the adapter are
# unscaled.
_FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TrainingJob:
    """What a training run needs besides the model; each step calls `stop_requested` once."""

    train_rows: Dataset
    train_tokens: batches.IntArray  # tokens of each row
    heldout_rows: Sequence[dict[str, Any]]  # `input_ids`, `segments`
    heldout_characters: int
    recipe: TrainRecipe
    plan: Plan
    checkpoints: Path
    device: str  # cuda, cpu
    emit: Emit
    stop_requested: Callable[[], bool]
    dist: DistributedContext = field(default_factory=DistributedContext)
    monitor: Monitor = field(default_factory=Monitor)
    max_temperature: float | None = None  # degrees Celsius; None: no limit
    loraplus_lr_ratio: float = 1.0  # the B matrices' learning rate over the A matrices'
    share_prefix: bool = True  # the rows of a pack share one copy of their common prefix


def train(model: Any, job: TrainingJob, resume: Path | None = None) -> TrainState:
    """Train the adapter of a PEFT model until the run is complete or asked to stop.

    Return the counters; `best_step` names the checkpoint whose weights to take. `resume` is the
    checkpoint folder to start from.

    Raises:
        UserError: a loss or gradient is not finite, or a checkpoint couldn't be written.
    """
    recipe, dist, meter = job.recipe, job.dist, job.monitor.meter
    state = checkpoint.read_state(resume) if resume else TrainState()
    job.monitor.step = state.step
    steps = batches.plan_steps(job.train_tokens, recipe)
    step_tokens = [int(job.train_tokens[rows].sum()) for rows in steps]
    step_batches = batches.StepBatches(
        job.train_rows, job.train_tokens, steps, job.plan.micro_batch_tokens,
        dist.rank, dist.size, job.share_prefix,
    )  # fmt: skip
    heldout_lengths = [len(row["input_ids"]) for row in job.heldout_rows]
    own = batches.rows_of_rank(heldout_lengths, dist.rank, dist.size)
    heldout = list(make_packs([job.heldout_rows[i] for i in own], job.plan.micro_batch_tokens))
    thermal = ThermalGuard(job.max_temperature, job.monitor, dist, job.emit, job.stop_requested)

    if job.plan.checkpointing:  # recompute each layer's activations in the backward pass
        name = "activation_checkpointing_enable"
        if not hasattr(model, name):  # transformers 5.20, which JetPack 6's Python is limited to
            name = "gradient_checkpointing_enable"
        getattr(model, name)({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    parameters = trainable_parameters(model)
    dist.broadcast_parameters(parameters)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, job.loraplus_lr_ratio), lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay, fused=True,
    )  # fmt: skip
    if resume:
        checkpoint.load_adapter_weights(model, resume)
        checkpoint.load_optimizer(optimizer, resume)
    heldout_tokens = sum(heldout_lengths)
    batches.resolve_total_steps(state, recipe, step_tokens, heldout_tokens)
    saved_at = time.monotonic()
    if state.evaluation_due:  # a stop went before it
        evaluate_adapter(model, heldout, job, state)
        saved_at = save(model, optimizer, state, job)

    while not state.is_complete:
        batch = step_batches[state.step]
        started = time.monotonic()
        meter.start(started)
        model.train()
        # For what a model may draw by itself (a router's noise): a resumed run draws the same.
        # The adapter's dropout doesn't depend on it (`kernels.dropout`).
        seeds = np.random.SeedSequence([recipe.seed, state.step, dist.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))  # 32 bits, as CPU generators take
        loss = forward_backward(model, batch, job, state.step + 1)
        dist.all_reduce_gradients(parameters)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise _diverged(_("gradient"), state.step + 1, job)
        lr = recipe.learning_rate * batches.lr_multiplier(state, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        optimizer.step()
        optimizer.zero_grad()

        stats = reduce_stats(job, started, saved_at)
        state.add_step(batch, stats)
        job.monitor.step = state.step
        resolved = batches.resolve_total_steps(state, recipe, step_tokens, heldout_tokens)
        if not resolved:
            batches.advance_lr(state, recipe)
        seconds_left = None
        if state.total_steps is not None:
            tokens_left = sum(step_tokens[state.step : state.total_steps])
            seconds_left = tokens_left / state.recent_rate
            if resolved:
                job.emit(TotalSteps(
                    step=state.step, total_steps=state.total_steps, seconds_left=seconds_left
                ))  # fmt: skip
        job.emit(Step(
            step=state.step, total_steps=state.total_steps, loss=loss, lr=lr, grad_norm=grad_norm,
            tokens=state.tokens, tokens_per_second=state.tokens_per_second,
            seconds_left=seconds_left, memory=peak_memory_bytes(job.device),
        ))  # fmt: skip

        # The base model, after the first step: so the first `Step` event needn't wait for it.
        if state.step == 1 and not stats.stop_requested:
            with model.disable_adapter():
                evaluate(model, heldout, job, step=0)
        evaluated = state.evaluation_due and not stats.stop_requested
        if evaluated:
            evaluate_adapter(model, heldout, job, state)
        # Save as soon as the number of steps is set: a resumed run must keep it.
        if (
            evaluated or resolved or stats.stop_requested
            or stats.seconds_since_save > 60 * recipe.save_minutes
        ):  # fmt: skip
            saved_at = save(model, optimizer, state, job)
        if stats.stop_requested:
            break
        if not state.is_complete and thermal.wait(state.step):
            save(model, optimizer, state, job)
            break
    return state


def forward_backward(model: Any, batch: StepBatch, job: TrainingJob, step: int) -> float:
    """Run forward and backward over this rank's micro-batches of a step.

    The gradients are sums over this rank's rows, divided by the supervised tokens of the whole
    step. Return the step's mean loss over all ranks, in nats a supervised token.
    """
    scale = _FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0
    total = torch.zeros((), device=job.device)
    with job.dist.collective_errors():
        extra = dummy_batches(job, len(batch.packs))
        for pack in batch.packs:
            total += backward_pack(model, pack, job, step, batch.supervised_tokens, scale)
        for pack in extra:
            backward_pack(model, pack, job, step, 1, 0.0)
    if scale != 1.0:
        for parameter in trainable_parameters(model):
            if parameter.grad is not None:
                parameter.grad /= scale
    (loss,) = job.dist.all_reduce_sum([float(total)])
    if not math.isfinite(loss):
        raise _diverged(_("loss"), step, job)
    return loss


def backward_pack(
    model: Any, pack: Pack, job: TrainingJob, step: int, supervised_tokens: int, scale: float
) -> torch.Tensor:
    """Run one micro-batch forward and backward; return its part of the step's mean loss.

    On return its graph is freed: bitsandbytes' int8 layers hold their inputs in it.
    """
    pack = pack.to(job.device)
    with use_dropout_keys(model, pack, job.recipe.seed, step):
        loss = token_losses(model, pack).sum() / supervised_tokens
        (loss * scale).backward()
    return loss.detach()


def dummy_batches(job: TrainingJob, own_count: int) -> list[Pack]:
    """Return dummy micro-batches, so that all ranks pass sharded layers equally often."""
    if job.plan.shards == 1:
        return []
    dummy = pack_rows([{"input_ids": [0, 0], "segments": [0, END]}])
    return [dummy] * (job.dist.all_reduce_max(own_count) - own_count)


def evaluate_adapter(model: Any, heldout: list[Pack], job: TrainingJob, state: TrainState) -> None:
    """Score the held-out rows with the adapter and count the result."""
    heldout_loss = evaluate(model, heldout, job, state.step)
    if not math.isfinite(heldout_loss):
        raise _diverged(_("held-out loss"), state.step, job)
    state.add_evaluation(heldout_loss, job.recipe.early_stopping_patience)


def evaluate(model: Any, heldout: list[Pack], job: TrainingJob, step: int) -> float:
    """Score the held-out rows of all ranks, emit the result, return the loss in nats per token."""
    started = time.monotonic()
    packs = heldout + dummy_batches(job, len(heldout))
    with job.dist.collective_errors():
        score = score_packs(model, packs, job.heldout_characters, job.dist.all_reduce_sum)
    job.emit(Evaluated(
        step=step, heldout_loss=score.loss, bits_per_char=score.bits_per_char,
        seconds=time.monotonic() - started,
    ))  # fmt: skip
    return score.loss


def reduce_stats(job: TrainingJob, started: float, saved_at: float) -> StepStats:
    """End a step's clock and energy meter, and reduce its statistics over all ranks."""
    dist, now = job.dist, time.monotonic()
    joules = job.monitor.meter.stop(now)
    main, local_main = float(dist.is_main), float(dist.is_local_main)
    # Each value is non-zero only on the ranks that count: rank 0 for the times, any rank for a
    # stop, each machine's first rank for the energy.
    seconds, since_save, stops, energy, unknown = dist.all_reduce_sum(
        [
            main * (now - started),
            main * (now - saved_at),
            float(job.stop_requested()),
            local_main * (joules or 0.0),
            local_main * (joules is None),
        ]
    )
    return StepStats(
        seconds=seconds, seconds_since_save=since_save, stop_requested=stops > 0,
        joules=None if unknown else energy,
    )  # fmt: skip


def save(
    model: Any, optimizer: torch.optim.Optimizer, state: TrainState, job: TrainingJob
) -> float:
    """Write a checkpoint on rank 0 and delete old ones; return the time on `time.monotonic`."""
    started = time.monotonic()
    if not job.dist.is_main:
        return started

    def save_files(folder: Path) -> None:
        model.save_pretrained(folder, safe_serialization=True)
        checkpoint.save_optimizer(optimizer, folder)

    path = checkpoint.write_checkpoint(job.checkpoints, state, save_files)
    checkpoint.delete_old_checkpoints(job.checkpoints, job.recipe.save_total_limit, state)
    now = time.monotonic()
    job.emit(CheckpointSaved(step=state.step, path=str(path), seconds=now - started))
    return now


def trainable_parameters(model: Any) -> Sequence[torch.nn.Parameter]:
    """Return the adapter's parameters, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: Any, loraplus_lr_ratio: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups, each with the ratio of its learning rate to the recipe's.

    LoRA+ (Hayou et al., 2024, https://arxiv.org/abs/2402.12354) trains the B matrices at a higher
    rate than the A matrices.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = loraplus_lr_ratio if ".lora_B." in name else 1.0
            groups.setdefault(ratio, []).append(parameter)
    return [{"params": group, "lr_ratio": ratio} for ratio, group in groups.items()]


def _diverged(quantity: str, step: int, job: TrainingJob) -> UserError:
    return UserError(
        _("The {quantity} is not finite at step {step}; training has stopped. The last good "
          "checkpoint is kept."),
        str(job.checkpoints),
        _("Lower the learning rate (--set train.learning_rate={rate:g}), raise train.warmup_steps, "
          "or use `precision: bf16` or `fp32` instead of fp16."),
        quantity=Message(quantity), step=step, rate=job.recipe.learning_rate / 4,
    )  # fmt: skip
