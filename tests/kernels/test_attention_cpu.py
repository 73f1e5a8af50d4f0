"""Attention of packed rows on a CPU gives what PyTorch's own gives for each row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from jetson_ft.kernels.attention_cpu import _blocks, blockwise_attention

ROWS = [
    ([1], 0),
    ([7], 0),
    ([128], 0),
    ([129], 0),
    ([300], 0),
    ([3, 1, 200, 5, 60, 131], 0),  # blocks that hold several rows, rows of several blocks
    ([20, 300, 19, 150], 17),
    ([140, 200, 135], 130),  # an shared_prefix longer than a block
    ([70, 70, 70, 70], 69),
    ([1300, 40], 0),  # larger steps, larger blocks
    ([1100, 1090], 1030),
]


def tensors(tokens: int, heads: int, groups: int) -> list[Tensor]:
    torch.manual_seed(0)
    # Values may have another width (DeepSeek's and MiniCPM3's attention).
    shapes = [(1, heads, tokens, 16), (1, groups, tokens, 16), (1, groups, tokens, 12)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def tokens_of(rows: list[int], shared_prefix: int) -> int:
    return sum(rows) - shared_prefix * (len(rows) - 1)


def alone(qkv: list[Tensor], rows: list[int], shared_prefix: int, scaling: float | None) -> Tensor:
    """PyTorch's attention of each whole row; of a shared prefix, the first result."""
    outputs, start = [], shared_prefix
    for number, length in enumerate(rows):
        own = slice(start, start + length - shared_prefix)
        whole = [torch.cat([x[:, :, :shared_prefix], x[:, :, own]], 2) for x in qkv]
        grouped = qkv[0].shape[1] != qkv[1].shape[1]
        out = scaled_dot_product_attention(
            *whole, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out[:, :, shared_prefix if number else 0 :])
        start = own.stop
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize(("rows", "shared_prefix"), ROWS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_results_and_gradients_are_those_of_each_row_alone(
    rows: list[int], shared_prefix: int, heads: int, groups: int, scaling: float | None
) -> None:
    qkv = tensors(tokens_of(rows, shared_prefix), heads, groups)
    ours, own = (
        blockwise_attention(*qkv, rows, shared_prefix, scaling),
        alone(qkv, rows, shared_prefix, scaling),
    )
    assert torch.allclose(ours, own, atol=1e-5)
    grad_output = torch.randn_like(own)
    actual = torch.autograd.grad(ours, qkv, grad_output)
    for a, b in zip(actual, torch.autograd.grad(own, qkv, grad_output), strict=True):
        assert torch.allclose(a, b, atol=3e-5)


@pytest.mark.parametrize(("rows", "shared_prefix"), [([200], 0), ([90, 150, 40], 24)])
def test_in_bf16_results_agree_within_its_precision(rows: list[int], shared_prefix: int) -> None:
    exact = tensors(tokens_of(rows, shared_prefix), 4, 2)
    qkv = [x.detach().bfloat16().requires_grad_() for x in exact]
    ours, own = (
        blockwise_attention(*qkv, rows, shared_prefix, None),
        alone(exact, rows, shared_prefix, None),
    )
    grad_output = torch.randn_like(own)
    actual = [ours.detach(), *torch.autograd.grad(ours, qkv, grad_output.bfloat16())]
    expected = [own.detach(), *torch.autograd.grad(own, exact, grad_output)]
    for a, b in zip(actual, expected, strict=True):
        assert float((a.float() - b).abs().max()) < 0.03 * float(b.abs().max())


@pytest.mark.parametrize("longest", [300, 2000])
def test_the_shapes_of_products_are_few(longest: int) -> None:
    """Whatever the rows: all but those of the last block, of which there is one in a pack."""
    shapes = set()
    for shift in range(20):
        rows = (longest - 100 + shift, 90, longest - 120 - shift, longest)
        shapes |= {block.mask.shape for block in _blocks(rows, 24, torch.float32)[:-1]}
    assert len(shapes) <= 9  # eight steps, and a block across two rows


def test_blocks_of_the_longest_rows_have_a_bounded_size() -> None:
    """Their scores are [heads, queries, keys]."""
    assert {block.stop - block.start for block in _blocks((9000,), 0, torch.float32)[:-1]} == {512}
