#!/usr/bin/env python3
"""Compare the losses of a Phi over 200 steps in plain Trainer and in this program.

    python benchmarks/phi_curve.py --precision fp32
    python benchmarks/phi_curve.py --precision bf16

A Phi of two layers with random weights and a vocabulary made from the bundled rows is trained on
those rows, several times over, with rank 8 on every linear layer. `trainer` is transformers'
Trainer with PEFT's own layers (at bf16 under autocast: fp32 adapters), padded and with
checkpointing; `ours-without-fused` is this program with PEFT's layers, which multiply adapters in
fp32; `ours` multiplies them in the precision of the base model and keeps fp32 master values.
Prints the mean loss of every 25 steps, and the differences from `trainer`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from jetson_ft.bench.runner import bench
from jetson_ft.bench.table import Measurement, require_success
from jetson_ft.bench.workload import ROWS_PER_STEP, Settings
from jetson_ft.hardware.detect import usable_cores

VARIANTS = ("trainer", "ours-without-fused", "ours")
STEPS, SPAN, VOCABULARY = 200, 25, 2048
ROWS = Path(__file__).parents[1] / "jetson_ft" / "data" / "bundled" / "zh_train.jsonl"


def make_rows(path: Path) -> Path:
    """Write the bundled rows as often as 200 steps need them, each with its own number."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    lines = []
    for number in range(STEPS * ROWS_PER_STEP):
        messages = [dict(message) for message in rows[number % len(rows)]["messages"]]
        messages[0]["content"] += f" {number}"
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_model(folder: Path, rows: Path) -> Path:
    """Write a small Phi with a tokenizer trained on those rows; return its folder."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast

    bpe, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    bpe.train([str(rows)], vocab_size=VOCABULARY, special_tokens=[end])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=end)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def show(rounds: list[Measurement]) -> None:
    """Print a Markdown table of the curves, then the differences from `trainer`."""
    require_success(rounds)
    losses = {
        one["variant"]: [math.nan if loss is None else loss for loss in one["losses"]]
        for one in rounds
    }
    print("| steps | " + " | ".join(losses) + " |\n|---|" + "---:|" * len(losses))
    for start in range(0, STEPS, SPAN):
        means = [statistics.fmean(curve[start : start + SPAN]) for curve in losses.values()]
        cells = " | ".join(f"{mean:.4f}" for mean in means)
        print(f"| {start + 1} to {start + SPAN} | {cells} |")
    for variant, curve in losses.items():
        differences = [abs(a - b) for a, b in zip(curve, losses["trainer"], strict=True)]
        mean = statistics.fmean(differences)
        print(f"{variant}: at most {max(differences):.5f} nats from trainer, {mean:.5f} on average")


def main() -> None:
    """Train the variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="auto")
    precision = parser.parse_args().precision
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(folder / "rows.jsonl")
        model = make_model(folder / "model", rows)
        settings = Settings(
            str(model), str(rows), STEPS * ROWS_PER_STEP, 128, 8, 1, usable_cores(), VARIANTS,
            precision=precision,
        )  # fmt: skip
        report = bench(settings, folder / "out", lambda turn: None)
    show(report["rounds"])


if __name__ == "__main__":
    main()
