"""Models with random weights, a byte-level tokenizer and rows, for tests and scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(template: str | None) -> Any:
    """Bytes as tokens, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {text: number for number, text in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>" if template else "<|endoftext|>",
        additional_special_tokens=special[1:],
    )
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder: Path, config: Any, template: str | None) -> Path:
    """Random weights, the same in every session, with the tokenizer beside them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def phi_config(hidden_size: int) -> Any:
    """A Phi of two layers."""
    from transformers import PhiConfig

    return PhiConfig(
        vocab_size=259, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def write_rows(path: Path) -> None:
    """Write forty short alpaca rows, each different."""
    rows = [
        {
            "instruction": f"第{n}题：{n}加{n + 1}等于几？",
            "input": "",
            "output": f"等于{2 * n + 1}。" * (1 + n % 3),
        }
        for n in range(40)
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
