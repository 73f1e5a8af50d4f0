"""Attention with its rotation in one function gives what the model's own gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip
from transformers.models.llama import modeling_llama

from jetson_ft.models import rotary
from jetson_ft.models.fused import fuse

SMALL = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 9, 4, 9, 5, 2]])


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (LlamaConfig(**SMALL, num_key_value_heads=2), 1),
        (LlamaConfig(**SMALL, head_dim=16), 1),
        (PhiConfig(**SMALL), 1),
        (PhiConfig(**SMALL, qk_layernorm=True), 0),
        (Qwen2Config(**SMALL, num_key_value_heads=2), 1),
        (Qwen2Config(**SMALL, num_key_value_heads=2, **WINDOWED), 1),
        (Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=12), 0),  # norms of its own
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None), 1),
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4), 1),
        (LlamaConfig(**SMALL, attn_implementation="eager"), 1),  # by its own forward
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_logits_gradients_and_replies_stay(config: Any, taken: int) -> None:
    own, mine = make(config), make(config)
    assert fuse(mine).get("rotary", 0) == taken
    gradients = []
    for model in (own, mine):
        logits = model(IDS).logits
        logits.square().mean().backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        gradients.append((logits.detach(), weight.grad))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    replies = [m.generate(IDS, max_new_tokens=5, do_sample=False) for m in (own, mine)]
    assert torch.equal(*replies)


def test_masks_are_handed_on() -> None:
    """Rows padded on the left, as replies in a batch have them."""
    own, mine = make(LlamaConfig(**SMALL)), make(LlamaConfig(**SMALL))
    fuse(mine)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    found = [m(IDS, attention_mask=mask, use_cache=False).logits[1, 2:] for m in (own, mine)]
    assert torch.allclose(*found, atol=1e-6)
    assert not torch.allclose(found[1], mine(IDS).logits[1, 2:], atol=1e-5)


def test_dropout_of_attention_is_handed_on() -> None:
    config = LlamaConfig(**SMALL, attention_dropout=0.5)
    found = []
    for model in (make(config), make(config)):
        if found:
            fuse(model)
        torch.manual_seed(3)
        found.append(model.train()(IDS, use_cache=False).logits)
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize(("direction", "expected"), [(1, {"rotary": 1}), (-1, {})])
def test_a_rotation_in_the_other_direction_is_left(
    direction: int, expected: dict[str, int]
) -> None:
    class LlamaAttention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: Any, position_embeddings: Any, *more: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(hidden_states, (cos, direction * sin), *more)

    torch.manual_seed(0)
    layer = LlamaAttention(LlamaConfig(**SMALL, attn_implementation="sdpa"), 0)
    assert fuse(torch.nn.ModuleList([layer])) == expected


@pytest.mark.parametrize("width", [4, 6])
def test_its_gradient_is_checked_numerically(width: int) -> None:
    """Whole heads, and the first four of six numbers."""
    angles = torch.rand(1, 1, 5, 2, dtype=torch.double)
    x = torch.randn(1, 5, 3, width, dtype=torch.double, requires_grad=True)
    assert gradcheck(
        lambda a: rotary._Rotated.apply(a.transpose(1, 2), angles.cos(), angles.sin()), x
    )
