"""Our arms: the path of `runs.pipeline`, and the same without one of its parts."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.bench.lesson import Lesson, Trained
from jetson_ft.device import probe

if TYPE_CHECKING:
    from jetson_ft.training.planner import Plan
    from jetson_ft.training.trainer import Job


def train(lesson: Lesson, folder: str, without: str = "") -> Trained:
    """Trains as a run does.

    Args:
        without: `fused` layers, `head` left out of the model, `packing`, `sharing` of what
            rows begin with, `kept` activations; or nothing.
    """
    from jetson_ft.bench.trainers import plain_model
    from jetson_ft.models import attention
    from jetson_ft.models.loss import without_head
    from jetson_ft.training import trainer
    from jetson_ft.training.memory import peak_memory_bytes

    chosen = _plan(lesson, without)  # before the model is there, as in a run
    model = plain_model(lesson) if without == "fused" else _fused_model(lesson)
    packing = chosen.micro_batch_tokens > 0 and attention.supports_packing(model)
    chosen = chosen if packing else replace(chosen, micro_batch_tokens=0)
    seen = Trained(plan=chosen.as_json())
    with (
        nullcontext() if without == "head" else without_head(model),
        attention.packed(model) if packing else nullcontext(),
    ):
        trainer.fit(model, _job(lesson, folder, chosen, seen, without != "sharing"))
    seen.peak_memory_bytes = peak_memory_bytes(lesson.device.kind)
    seen.computed_tokens = _computed(lesson, chosen.micro_batch_tokens, without != "sharing")
    return seen


def _computed(lesson: Lesson, capacity: int, share: bool) -> int:
    """Timed tokens that go through the layers: a shared opening once for a micro-batch."""
    from jetson_ft.models.packing import packs

    timed = [[lesson.rows[index] for index in step] for step in lesson.steps()[1:]]
    return sum(pack.tokens for step in timed for pack in packs(step, capacity, share=share))


def _plan(lesson: Lesson, without: str) -> Plan:
    """What the planner chooses, but for the part that is left out."""
    from jetson_ft.training import memory, planner

    device = probe.probe()
    flops = probe.measure_flops(device.kind, lesson.precision)
    chosen = planner.choose(lesson.work(), memory.with_own(device), flops)
    if without == "packing":
        return replace(chosen, micro_batch_tokens=0)
    return replace(chosen, checkpointing=True) if without == "kept" else chosen


def _fused_model(lesson: Lesson) -> Any:
    from jetson_ft.models import adapter, fused, load

    base = load.load_model(lesson.base, lesson.weights, lesson.device.kind)
    recipe = lesson.settings.recipe()
    model = adapter.attach(base, recipe.lora, recipe.train.seed)
    fused.fuse(model)
    return model


def _job(lesson: Lesson, folder: str, plan: Plan, seen: Trained, share: bool) -> Job:
    """The rows as `Lesson.steps` has them, and no held-out ones: training alone is timed."""
    import numpy as np
    from datasets import Dataset

    from jetson_ft.training.trainer import Job

    def note(kind: str, **fields: Any) -> None:
        # A step's event comes at its end, when its loss is known on the host.
        if kind == "step":
            seen.ends.append(time.perf_counter())
            seen.losses.append(fields["loss"])

    return Job(
        train_rows=Dataset.from_list(
            [row | {"supervised": sum(map(bool, row["parts"][1:]))} for row in lesson.rows]
        ),
        train_tokens=np.ones(len(lesson.rows), dtype=np.int64),
        heldout_packs=[],
        heldout_tokens=0,
        heldout_characters=0,
        recipe=lesson.settings.recipe().train,
        plan=plan,
        checkpoints=Path(folder),
        device=lesson.device.kind,
        emit=note,
        stop_requested=lambda: False,
        share=share,
    )
