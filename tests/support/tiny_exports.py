"""Small models with a tokenizer that llama.cpp's converter knows: the embedded model's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tiny_architectures import tiny_config


@functools.cache
def smollm_tokenizer() -> Any:
    """The embedded model's tokenizer, from its package."""
    from jetson_ft.models import embedded
    from jetson_ft.models.files import BaseModelFiles
    from jetson_ft.models.loading import load_tokenizer

    file = embedded._packaged_gguf()
    return load_tokenizer(BaseModelFiles("embedded", file.parent, file.name))


# Settings that give a small model the form of the family's real ones: llama.cpp assumes it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 128},  # no groups of heads; 4 x width
    "gpt2": {"n_inner": 128},  # 4 x width
    "qwen3": {"layer_types": ["full_attention"] * 2, "use_sliding_window": False},
    # Each sixth layer has full attention.
    "gemma3_text": {"layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 1]},  # each fourth has no positions
}


def save_tiny_model(folder: Path, kind: str, template: str | None = None, **settings: Any) -> Path:
    """Write a model of an architecture with random weights, so large that its layers matter."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = smollm_tokenizer()
    config = tiny_config(kind)
    for name, value in {
        "vocab_size": len(tokenizer),
        "head_dim": 16,
        **FAMILIES.get(kind, {}),
        **settings,
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.half().save_pretrained(folder)  # as merged models are that become GGUF files
    tokenizer.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
