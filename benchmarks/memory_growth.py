#!/usr/bin/env python3
"""Measure whether memory grows over the steps of a training run of the embedded model.

    python benchmarks/memory_growth.py --precision bf16
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 python benchmarks/memory_growth.py --precision bf16

Each step has 8 random bundled rows. Environment variables are those of a run's worker, except
where they are set already. Prints the peak of resident memory and the rate so far.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from typing import Any

from jetson_ft.runs.processes import WORKER_ENVIRONMENT

ROWS_PER_STEP = 8


def prepare(precision: str, max_length: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return the model with a fresh adapter of rank 8, and the tokenized rows."""
    from jetson_ft.models import fast_import

    fast_import.import_libraries()
    from jetson_ft import adapter
    from jetson_ft.data.prepare import prepare_rows
    from jetson_ft.kernels import fused_layers
    from jetson_ft.models import files
    from jetson_ft.models.loading import WeightFormat, load_model, load_tokenizer
    from jetson_ft.recipe import Recipe

    recipe = Recipe.model_validate({"data": {"max_length": max_length}, "lora": {"rank": 8}})
    base = files.resolve_model(recipe.model)
    rows = list(prepare_rows(recipe.data, load_tokenizer(base)).train)
    model = adapter.attach_adapter(
        load_model(base, WeightFormat(precision), "cpu"), recipe.lora, seed=0
    )
    fused_layers.fuse_layers(model)
    return model.train(), rows


def main() -> None:
    """Train, and print every sixth step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--micro-batch", type=int, default=768, help="tokens")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    environment = {**WORKER_ENVIRONMENT, **os.environ}
    if environment != dict(os.environ):  # the libraries read it when they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606 (itself)
    import numpy as np
    import torch

    from jetson_ft.kernels import attention
    from jetson_ft.kernels.lm_head_loss import chunked_lm_head, token_losses
    from jetson_ft.kernels.packing import make_packs

    model, rows = prepare(options.precision, 512)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    generator, tokens, started = np.random.default_rng(0), 0, time.perf_counter()
    with chunked_lm_head(model), attention.use_packed_attention(model):
        for step in range(1, options.steps + 1):
            numbers = generator.choice(len(rows), ROWS_PER_STEP, replace=False)
            for pack in make_packs([rows[i] for i in numbers], options.micro_batch):
                token_losses(model, pack).mean().backward()
                tokens += pack.tokens
            optimizer.step()
            optimizer.zero_grad()
            if step == 1 or step % 6 == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                rate = tokens / (time.perf_counter() - started)
                print(f"step {step}: {peak:,} MiB at most, {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
