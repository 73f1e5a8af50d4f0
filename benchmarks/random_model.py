#!/usr/bin/env python3
"""Phi-1.5 with random weights, for measuring speed and memory without a download.

    python benchmarks/random_model.py FOLDER
    jetson-ft bench --model FOLDER

Its tokenizer is the embedded model's, or that of `--tokenizer FOLDER`: what is measured depends
on how many tokens the rows have, not on which.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from jetson_ft.models import resolve


def main() -> None:
    """Writes config, weights in bf16 and tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = PhiConfig(bos_token_id=1, eos_token_id=2)  # its other defaults are Phi-1.5's
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(chosen.folder)
    tokenizer = chosen.tokenizer or resolve.resolve("embedded").folder
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(chosen.folder)
    print(f"{model.num_parameters():,} parameters in {chosen.folder}")


if __name__ == "__main__":
    main()
