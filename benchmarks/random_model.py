#!/usr/bin/env python3
"""Write a Phi-1.5 with random weights, to measure speed and memory without a download.

    python benchmarks/random_model.py FOLDER
    jetson-ft bench --model FOLDER

Its tokenizer is the embedded model's, or that of `--tokenizer FOLDER`. The measurements depend on
the number of tokens of the rows, not on which tokens they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from jetson_ft.models import files


def main() -> None:
    """Write config, weights in bf16 and tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = PhiConfig(bos_token_id=1, eos_token_id=2)  # its other defaults are Phi-1.5's
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.folder)
    tokenizer = options.tokenizer or files.resolve_model("embedded").folder
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(options.folder)
    print(f"{model.num_parameters():,} parameters in {options.folder}")


if __name__ == "__main__":
    main()
