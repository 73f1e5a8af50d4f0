#!/usr/bin/env python3
"""A model of a known shape with random weights, for measuring speed and memory without a download.

    python benchmarks/random_model.py phi-1.5 FOLDER
    jetson-ft bench --model FOLDER

Its tokenizer is the embedded model's, or that of `--tokenizer FOLDER`: what is measured depends
on how many tokens the rows have, not on which.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PhiConfig

from jetson_ft.models import resolve


def configs() -> dict[str, Any]:
    """Phi-1.5's shape is the default of its config; the other is the embedded model's."""
    return {
        "phi-1.5": PhiConfig(bos_token_id=1, eos_token_id=2),
        "smollm2-135m": LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip


def main() -> None:
    """Writes config, weights in bf16 and tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=sorted(configs()))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(configs()[chosen.shape], dtype=torch.bfloat16)
    model.save_pretrained(chosen.folder)
    tokenizer = chosen.tokenizer or resolve.resolve("embedded").folder
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(chosen.folder)
    print(f"{model.num_parameters():,} parameters in {chosen.folder}")


if __name__ == "__main__":
    main()
