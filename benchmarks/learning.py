#!/usr/bin/env python3
"""Compare what settings learn: held-out bits per character at equal tokens and at equal seconds.

    python benchmarks/learning.py --tokens 60000
    python benchmarks/learning.py --minutes 2

The embedded model is trained on `bundled-short` with the quickstart's settings and one change at a
time, each over several seeds (of the row order and the adapter), in a process of its own, round by
round. The schedule of the learning rate ends with the tokens or the minutes. Prints a Markdown
table: the mean over the seeds, their range, and the difference from the first setting with the same
seed, which tells more than the mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# By name, what differs from the quickstart's settings. `prompts`: questions are trained on too.
SETTINGS: dict[str, list[str]] = {
    "rate 2e-3, 512 tokens a step": [],
    "rate 1e-3, 1,024 tokens a step": ["train.learning_rate=1e-3", "train.tokens_per_step=1024"],
    "rate 1e-3": ["train.learning_rate=1e-3"],
    "rate 4e-3": ["train.learning_rate=4e-3"],
    "256 tokens a step": ["train.tokens_per_step=256"],
    "LoRA+ 4, rate 1e-3": ["lora.loraplus_lr_ratio=4", "train.learning_rate=1e-3"],
    "rank 64": ["lora.rank=64"],
    "rank 64, rsLoRA": ["lora.rank=64", "lora.rslora=true"],
    "questions trained on too": ["prompts"],
}


def train(overrides: list[str], seed: int, tokens: int, minutes: float) -> dict[str, Any]:
    """Train once in this process; return the held-out bits per character, tokens and seconds."""
    import numpy as np

    from jetson_ft import adapter, recipe
    from jetson_ft.data.prepare import prepare_rows
    from jetson_ft.data.tokenize import token_counts
    from jetson_ft.events import Evaluated, Event
    from jetson_ft.hardware import detect
    from jetson_ft.kernels import attention
    from jetson_ft.kernels.fused_layers import fuse_layers
    from jetson_ft.kernels.lm_head_loss import chunked_lm_head
    from jetson_ft.models import files, loading
    from jetson_ft.training import batches, loop
    from jetson_ft.training.planner import Plan

    prompts = "prompts" in overrides
    changes = [change for change in overrides if change != "prompts"]
    changes += [f"train.seed={seed}", "train.epochs=50", "train.max_minutes=null"]
    settings = recipe.load_recipe("quickstart-zh", changes)
    device = detect.detect_device()
    base = files.resolve_model(settings.model)
    rows = prepare_rows(settings.data, loading.load_tokenizer(base))
    train_rows, counts = rows.train, token_counts(rows.train)
    if prompts:
        train_rows = train_rows.map(
            lambda row: {
                "segments": [max(1, segment) for segment in row["segments"]],
                "supervised": len(row["segments"]) - 1,
            }
        )
    if minutes:
        settings.train.max_minutes = minutes
    else:
        sizes = np.cumsum(
            [counts[step].sum() for step in batches.plan_steps(counts, settings.train)]
        )
        settings.train.max_steps = int(np.searchsorted(sizes, tokens)) + 1
    settings.train.eval_every = 10**6  # at the end alone
    model = loading.load_model(base, loading.weight_format(settings, device), device.kind)
    model = adapter.attach_adapter(model, settings.lora, seed)
    fuse_layers(model)
    measured: list[Event] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        chunked_lm_head(model),
        attention.use_packed_attention(model),
    ):
        job = loop.TrainingJob(
            train_rows=train_rows,
            train_tokens=counts,
            heldout_rows=list(rows.heldout),
            heldout_characters=rows.heldout_characters,
            recipe=settings.train,
            plan=Plan(micro_batch_tokens=512, checkpointing=False),
            checkpoints=Path(folder),
            device=device.kind,
            emit=measured.append,
            stop_requested=lambda: False,
            loraplus_lr_ratio=settings.lora.loraplus_lr_ratio,
        )
        state = loop.train(model, job)
    last = [event for event in measured if isinstance(event, Evaluated)][-1]
    return {"bits": last.bits_per_char, "tokens": state.tokens, "seconds": state.train_seconds}


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table; each setting has a result for every seed, in the same order."""
    first, *_ = results.values()
    print("| setting | bits per character | range | difference | tokens | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, runs in results.items():
        bits = [run["bits"] for run in runs]
        differences = [run["bits"] - other["bits"] for run, other in zip(runs, first, strict=True)]
        tokens, seconds = (
            statistics.fmean(run[key] for run in runs) for key in ("tokens", "seconds")
        )
        print(
            f"| {name} | {statistics.fmean(bits):.3f} | {min(bits):.3f} to {max(bits):.3f} "
            f"| {statistics.fmean(differences):+.3f} | {tokens:,.0f} | {seconds:.0f} |"
        )


def main() -> None:
    """Train every setting with every seed, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens of each run")
    parser.add_argument("--minutes", type=float, default=0.0, help="minutes of each run, instead")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--run", nargs=2, metavar=("SETTING", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, seed = args.run
        print(json.dumps(train(SETTINGS[name], int(seed), args.tokens, args.minutes)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.settings}
    limit = ["--tokens", str(args.tokens), "--minutes", str(args.minutes)]
    for seed in range(args.seeds):
        for name in args.settings:
            command = [sys.executable, __file__, "--run", name, str(seed), *limit]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    show(results)


if __name__ == "__main__":
    main()
