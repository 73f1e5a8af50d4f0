#!/usr/bin/env python3
"""Compare predicted and measured peak memory in short runs of different recipes.

    python benchmarks/plan_accuracy.py [--model MODEL] [NAME …]

Each run trains twelve steps through the command line. The prediction is in its plan.json, the
measurement in its last step event: resident memory on a CPU; on a GPU what torch allocated, so
process and driver are left out of the prediction. Prints a Markdown table. The planner's constants
were fitted on the rows marked `fit`; only the others show its accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jetson_ft.events import Step, from_json
from jetson_ft.hardware import detect

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
        "precision": "fp32", "lora.target_modules": "[q_proj, v_proj]",
    },
}  # fmt: skip
# For a model of Phi-1.5's size; where `max_memory_gb` is set, only a plan that recomputes fits.
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
    "bf16, 4096, query and value layers alone": {"lora.target_modules": "[q_proj, v_proj]"},
}  # fmt: skip
SHORT = {
    "train.max_steps": "12",
    "train.early_stopping_patience": "null", "train.eval_every": "1000",
    "data.heldout": "2", "data.max_length": "512", "eval.max_new_tokens": "1", "eval.samples": "0",
}  # fmt: skip
STEP_TOKENS = {"cpu": "512", "cuda": "4096"}
# Parts of the prediction that the measurement doesn't include.
UNMEASURED = {"cpu": (), "cuda": ("process", "context")}


def measure(settings: dict[str, str]) -> tuple[dict[str, Any], int]:
    """Train once; return the content of plan.json, and the measured peak in bytes."""
    recipe = Path(__file__).with_name("plan_accuracy.yaml")
    with tempfile.TemporaryDirectory() as folder:
        sets = {**SHORT, **settings, "output_dir": folder}
        command = [sys.executable, "-m", "jetson_ft.cli", "train", str(recipe)]
        command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        run = next(path for path in Path(folder).iterdir() if (path / "plan.json").exists())
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [from_json(json.loads(line)) for line in lines]
    return plan, [event.memory for event in events if isinstance(event, Step)][-1]


def main() -> None:
    """Run the named recipes, or all, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("names", nargs="*", metavar="NAME")
    options, kind = parser.parse_args(), detect.detect_device().kind
    recipes = {"cpu": CPU, "cuda": GPU}[kind]
    common = {"model": options.model, "train.tokens_per_step": STEP_TOKENS[kind]}
    print("| recipe | recomputing | predicted GB | measured GB | off by |")
    print("|---|---|---:|---:|---:|")
    for name in options.names or recipes:
        plan, measured = measure({**common, **recipes[name]})
        parts = plan["parts"]
        predicted = sum(parts.values()) - sum(parts[name] for name in UNMEASURED[kind])
        recomputing = "yes" if plan["checkpointing"] else "no"
        figures = f"{predicted / 1e9:.2f} | {measured / 1e9:.2f} | {predicted / measured - 1:+.1%}"
        print(f"| {name} | {recomputing} | {figures} |", flush=True)
        print(json.dumps(parts), file=sys.stderr)


if __name__ == "__main__":
    main()
