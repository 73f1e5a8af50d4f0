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

from jetson_ft.kernels.fused_layers import _Rotated, fuse_layers

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
    ("config", "replaced"),
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
def test_logits_gradients_and_replies_are_the_models_own(config: Any, replaced: int) -> None:
    eager, fused = make(config), make(config)
    assert fuse_layers(fused).get("rotary", 0) == replaced
    gradients = []
    for model in (eager, fused):
        logits = model(IDS).logits
        logits.square().mean().backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        gradients.append((logits.detach(), weight.grad))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)
    replies = [m.generate(IDS, max_new_tokens=5, do_sample=False) for m in (eager, fused)]
    assert torch.equal(*replies)


def test_masks_reach_attention() -> None:
    """Rows padded on the left, as replies in a batch have them."""
    eager, fused = make(LlamaConfig(**SMALL)), make(LlamaConfig(**SMALL))
    fuse_layers(fused)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    logits = [m(IDS, attention_mask=mask, use_cache=False).logits[1, 2:] for m in (eager, fused)]
    assert torch.allclose(*logits, atol=1e-6)
    assert not torch.allclose(logits[1], fused(IDS).logits[1, 2:], atol=1e-5)


def test_dropout_reaches_attention() -> None:
    config = LlamaConfig(**SMALL, attention_dropout=0.5)
    logits = []
    for model in (make(config), make(config)):
        if logits:
            fuse_layers(model)
        torch.manual_seed(3)
        logits.append(model.train()(IDS, use_cache=False).logits)
    assert torch.allclose(*logits, atol=1e-6)


@pytest.mark.parametrize(("direction", "expected"), [(1, {"rotary": 1}), (-1, {})])
def test_a_rotation_in_the_other_direction_is_not_replaced(
    direction: int, expected: dict[str, int]
) -> None:
    class LlamaAttention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states: Any, position_embeddings: Any, *more: Any) -> Any:
            cos, sin = position_embeddings
            return super().forward(hidden_states, (cos, direction * sin), *more)

    torch.manual_seed(0)
    layer = LlamaAttention(LlamaConfig(**SMALL, attn_implementation="sdpa"), 0)
    assert fuse_layers(torch.nn.ModuleList([layer])) == expected


@pytest.mark.parametrize("width", [4, 6])
def test_the_rotations_gradient_is_checked_numerically(width: int) -> None:
    """Whole heads, and the first four of six numbers."""
    angles = torch.rand(1, 1, 5, 2, dtype=torch.double)
    x = torch.randn(1, 5, 3, width, dtype=torch.double, requires_grad=True)
    assert gradcheck(lambda a: _Rotated.apply(a.transpose(1, 2), angles.cos(), angles.sin()), x)
