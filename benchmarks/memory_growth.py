#!/usr/bin/env python3
"""Whether memory grows over the steps of a training: the embedded model, random bundled rows.

    python benchmarks/memory_growth.py --precision bf16
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 python benchmarks/memory_growth.py --precision bf16

It runs in the environment of a run's worker, but for what is set before. Prints the peak of
resident memory and the rate so far.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from typing import Any

from jetson_ft.runs.supervisor import WORKER_ENVIRONMENT

ROWS_PER_STEP = 8


def in_environment() -> None:
    """Starts itself again where the libraries would read other settings than a worker's."""
    wanted = {**WORKER_ENVIRONMENT, **os.environ}
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)  # noqa: S606 (itself)


def prepare(precision: str, max_length: int) -> tuple[Any, list[dict[str, Any]]]:
    """The model with a fresh adapter of rank 8, and the rows."""
    from jetson_ft.models import libraries

    libraries.load()
    from jetson_ft.models import adapter, fused, resolve
    from jetson_ft.models.load import Weights, load_model
    from jetson_ft.recipe import Recipe
    from jetson_ft.runs.pipeline import prepare_rows

    recipe = Recipe.model_validate({"data": {"max_length": max_length}, "lora": {"rank": 8}})
    base = resolve.resolve(recipe.model)
    rows = list(prepare_rows(recipe, base).train)
    model = adapter.attach(load_model(base, Weights(precision), "cpu"), recipe.lora, seed=0)
    fused.fuse(model)
    return model.train(), rows


def main() -> None:
    """Trains, and prints every sixth step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--micro-batch", type=int, default=768, help="tokens")
    parser.add_argument("--steps", type=int, default=24)
    chosen = parser.parse_args()
    in_environment()
    import numpy as np
    import torch

    from jetson_ft.models import attention
    from jetson_ft.models.loss import token_losses, without_head
    from jetson_ft.models.packing import packs

    model, rows = prepare(chosen.precision, 512)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    draw, tokens, started = np.random.default_rng(0), 0, time.perf_counter()
    with without_head(model), attention.packed(model):
        for step in range(1, chosen.steps + 1):
            of_step = [rows[i] for i in draw.choice(len(rows), ROWS_PER_STEP, replace=False)]
            for one in packs(of_step, chosen.micro_batch):
                token_losses(model, one).mean().backward()
                tokens += one.tokens
            optimizer.step()
            optimizer.zero_grad()
            if step == 1 or step % 6 == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                rate = tokens / (time.perf_counter() - started)
                print(f"step {step}: {peak:,} MiB at most, {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
