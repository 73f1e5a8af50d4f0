#!/usr/bin/env python3
"""Predicted against measured peak memory: short real runs of recipes of different shape.

    python benchmarks/plan_accuracy.py [NAME …]

Each run trains three steps through the command line, as anybody would start it; the prediction
is its plan.json's, the measurement its last step event's (resident memory on a CPU, torch's
allocation on a GPU). Prints a Markdown table. The planner's constants were fitted on the rows
marked `fit`; only the others say anything about its accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Name -> settings over the defaults. A micro-batch is never shorter than the longest row, so
# `data.max_length` with `train.tokens_per_step` sets its size.
RECIPES: dict[str, dict[str, str]] = {
    "fit: fp32, 512, rank 8": {"precision": "fp32", "lora.rank": "8"},
    "fit: fp32, 512, rank 8, recomputing": {
        "precision": "fp32", "lora.rank": "8", "train.max_memory_gb": "1.35",
    },
    "fit: bf16, 512, rank 8": {"precision": "bf16", "lora.rank": "8"},
    "bf16, 768, rank 8": {
        "precision": "bf16", "lora.rank": "8", "train.tokens_per_step": "768",
    },
    "fp32, 512, rank 32": {"precision": "fp32", "lora.rank": "32"},
    "fp32, 256, recomputing": {
        "precision": "fp32", "train.tokens_per_step": "256", "data.max_length": "256",
        "train.max_memory_gb": "1.35",
    },
    "bf16, 256, rank 64": {
        "precision": "bf16", "train.tokens_per_step": "256", "data.max_length": "256",
        "lora.rank": "64",
    },
    "nf4, 512": {"quantize": "nf4", "precision": "fp32"},
    "int8, 512": {"quantize": "int8", "precision": "fp32"},
    "int8, 512, recomputing": {
        "quantize": "int8", "precision": "fp32", "train.max_memory_gb": "1.24",
    },
    "fp32, 512, query and value layers alone": {
        "precision": "fp32", "lora.targets": "[q_proj, v_proj]",
    },
}  # fmt: skip
SHORT = {
    "train.tokens_per_step": "512", "train.max_steps": "3",
    "train.early_stopping": "0", "train.eval_every": "1000",
    "data.heldout": "2", "data.max_length": "512", "eval.max_new_tokens": "1", "eval.samples": "0",
}  # fmt: skip


def measure(settings: dict[str, str]) -> tuple[dict[str, Any], int]:
    """A run's plan.json, and its measured peak in bytes."""
    recipe = Path(__file__).with_name("plan_accuracy.yaml")
    with tempfile.TemporaryDirectory() as folder:
        sets = {**SHORT, **settings, "output": folder}
        command = [sys.executable, "-m", "jetson_ft.cli", "train", str(recipe)]
        command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        run = next(path for path in Path(folder).iterdir() if (path / "plan.json").exists())
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["kind"] == "step"]
    return plan, steps[-1]["memory"]


def main() -> None:
    """Runs what is named, or all, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or list(RECIPES)
    print("| recipe | recomputing | predicted GB | measured GB | off by |")
    print("|---|---|---:|---:|---:|")
    for name in names:
        plan, measured = measure(RECIPES[name])
        predicted, again = plan["peak_memory_bytes"], "yes" if plan["checkpointing"] else "no"
        figures = f"{predicted / 1e9:.2f} | {measured / 1e9:.2f} | {predicted / measured - 1:+.1%}"
        print(f"| {name} | {again} | {figures} |", flush=True)
        print(json.dumps(plan["parts"]), file=sys.stderr)


if __name__ == "__main__":
    main()
