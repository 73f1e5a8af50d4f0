#!/usr/bin/env python3
"""Predicted against measured peak memory: short real runs of recipes of different shape.

    python benchmarks/plan_accuracy.py [--model MODEL] [NAME …]

Each run trains twelve steps through the command line, as anybody would start it; the prediction
is its plan.json's, the measurement its last step event's (resident memory on a CPU; on a GPU
what torch allocated, so the process and the driver are left out of the prediction). Prints a
Markdown table. The planner's constants were fitted on the rows marked `fit`; only the others say
anything about its accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jetson_ft.device import probe

# Name -> settings over the defaults. A micro-batch is never shorter than the longest row, so
# `data.max_length` with `train.tokens_per_step` sets its size.
CPU: dict[str, dict[str, str]] = {
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
# For a model of Phi-1.5's size; recomputing begins where the other plans are granted no memory.
GPU: dict[str, dict[str, str]] = {
    "fit: bf16, 4096, rank 8": {"lora.rank": "8"},
    "fit: bf16, 2048, rank 8, recomputing": {
        "lora.rank": "8", "train.tokens_per_step": "2048", "train.max_memory_gb": "4.05",
    },
    "bf16, 2048, rank 64": {"lora.rank": "64", "train.tokens_per_step": "2048"},
    "bf16, 1024, rank 16": {"train.tokens_per_step": "1024"},
    "bf16, 1024, rank 16, recomputing": {
        "train.tokens_per_step": "1024", "train.max_memory_gb": "4.1",
    },
    "fp32, 2048": {"precision": "fp32", "train.tokens_per_step": "2048"},
    "int8, 2048": {"quantize": "int8", "train.tokens_per_step": "2048"},
    "nf4, 2048": {"quantize": "nf4", "train.tokens_per_step": "2048"},
    "nf4, 1024, recomputing": {
        "quantize": "nf4", "train.tokens_per_step": "1024", "train.max_memory_gb": "2.35",
    },
    "bf16, 4096, query and value layers alone": {"lora.targets": "[q_proj, v_proj]"},
}  # fmt: skip
SHORT = {
    "train.max_steps": "12",
    "train.early_stopping": "0", "train.eval_every": "1000",
    "data.heldout": "2", "data.max_length": "512", "eval.max_new_tokens": "1", "eval.samples": "0",
}  # fmt: skip
STEP_TOKENS = {"cpu": "512", "cuda": "4096"}
OUTSIDE = {"cpu": (), "cuda": ("process", "context")}  # of what is measured there


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("names", nargs="*", metavar="NAME")
    chosen, kind = parser.parse_args(), probe.probe().kind
    recipes = {"cpu": CPU, "cuda": GPU}[kind]
    common = {"model": chosen.model, "train.tokens_per_step": STEP_TOKENS[kind]}
    print("| recipe | recomputing | predicted GB | measured GB | off by |")
    print("|---|---|---:|---:|---:|")
    for name in chosen.names or recipes:
        plan, measured = measure({**common, **recipes[name]})
        predicted = sum(plan["parts"].values()) - sum(plan["parts"][x] for x in OUTSIDE[kind])
        again = "yes" if plan["checkpointing"] else "no"
        figures = f"{predicted / 1e9:.2f} | {measured / 1e9:.2f} | {predicted / measured - 1:+.1%}"
        print(f"| {name} | {again} | {figures} |", flush=True)
        print(json.dumps(plan["parts"]), file=sys.stderr)


if __name__ == "__main__":
    main()
