"""The backward pass of attention on a CPU is PyTorch's own, in other pieces."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jetson_ft.models.cpu_attention import attend


def tensors(length: int, heads: int, groups: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, length, 16), (1, groups, length, 16), (1, groups, length, 16)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_gradients_are_pytorchs_own(
    length: int, heads: int, groups: int, scaling: float | None
) -> None:
    query, key, value = tensors(length, heads, groups)
    slope = torch.randn_like(query)
    mine = attend(query, key, value, scaling)
    own = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=heads != groups
    )
    assert torch.equal(mine, own)
    found = torch.autograd.grad(mine, (query, key, value), slope)
    expected = torch.autograd.grad(own, (query, key, value), slope)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_in_bf16_they_agree_within_its_precision() -> None:
    query, key, value = (x.detach().bfloat16().requires_grad_() for x in tensors(200, 4, 2))
    slope = torch.randn_like(query)
    own = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found = torch.autograd.grad(attend(query, key, value, None), (query, key, value), slope)
    expected = torch.autograd.grad(own, (query, key, value), slope)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < 0.03 * float(b.abs().max())
