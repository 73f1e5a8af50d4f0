"""This program's variants: the training of `runs.pipeline`, whole or without one of its parts."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jetson_ft.bench.workload import BenchWorkload, Result
from jetson_ft.events import Event, Step
from jetson_ft.hardware import detect

Part = Literal["", "fused layers", "chunked head", "packing", "shared prefix", "kept activations"]


def train(workload: BenchWorkload, folder: str, without: Part = "") -> Result:
    """Train the workload as a run does; `folder` is for checkpoints."""
    import numpy as np
    from datasets import Dataset

    from jetson_ft.kernels import attention
    from jetson_ft.kernels.attention_trial import packing_obstacle
    from jetson_ft.kernels.lm_head_loss import chunked_lm_head
    from jetson_ft.kernels.packing import make_packs
    from jetson_ft.training import loop, memory, planner

    device, result = workload.device.kind, Result()
    # The plan is chosen before the model is loaded, as in a run.
    plan = planner.choose_plan(
        workload.planner_workload(),
        memory.with_own_memory(detect.detect_device()),
        detect.measure_flops(device, workload.weights.precision),
    )
    if without == "kept activations":
        plan = replace(plan, checkpointing=True)
    model = load_model(workload, fused=without != "fused layers")
    longest = max(len(row["input_ids"]) for row in workload.rows)
    packing = without != "packing" and packing_obstacle(model, longest) is None
    if not packing:
        plan = replace(plan, micro_batch_tokens=0)

    def on_event(event: Event) -> None:
        # A step's event comes at its end, when its loss is on the host.
        if isinstance(event, Step) and event.loss is not None:
            result.step_ends.append(time.perf_counter())
            result.losses.append(event.loss)

    job = loop.TrainingJob(
        train_rows=Dataset.from_list(workload.rows),
        train_tokens=np.ones(len(workload.rows), dtype=np.int64),  # `Settings.recipe` has why
        heldout_rows=[],
        heldout_characters=0,
        recipe=workload.settings.recipe().train,
        plan=plan,
        checkpoints=Path(folder),
        device=device,
        emit=on_event,
        stop_requested=lambda: False,
        share_prefix=without != "shared prefix",
    )
    with (
        nullcontext() if without == "chunked head" else chunked_lm_head(model),
        attention.use_packed_attention(model) if packing else nullcontext(),
    ):
        loop.train(model, job)
    result.plan = plan.as_json()
    result.peak_memory_bytes = memory.peak_memory_bytes(device)
    timed_steps = [[workload.rows[index] for index in step] for step in workload.steps()[1:]]
    result.computed_tokens = sum(
        pack.tokens
        for rows in timed_steps
        for pack in make_packs(rows, plan.micro_batch_tokens, share=job.share_prefix)
    )
    return result


def load_model(workload: BenchWorkload, fused: bool) -> Any:
    """Return the base with a fresh adapter; fused or with PEFT's and the model's own layers."""
    from jetson_ft import adapter
    from jetson_ft.kernels import fused_layers
    from jetson_ft.models import loading

    base = loading.load_model(workload.base, workload.weights, workload.device.kind)
    recipe = workload.settings.recipe()
    model = adapter.attach_adapter(base, recipe.lora, recipe.train.seed, fused=fused)
    if fused:
        fused_layers.fuse_layers(model)
    return model
