"""Attention of packed rows on a CPU is PyTorch's own of each row, in other pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from jetson_ft.models.cpu_attention import _blocks, attend

ROWS = [
    ([1], 0),
    ([7], 0),
    ([128], 0),
    ([129], 0),
    ([300], 0),
    ([3, 1, 200, 5, 60, 131], 0),  # blocks that hold several rows, rows of several blocks
    ([20, 300, 19, 150], 17),
    ([140, 200, 135], 130),  # an opening longer than a block
    ([70, 70, 70, 70], 69),
    ([1300, 40], 0),  # larger steps, larger blocks
    ([1100, 1090], 1030),
]


def tensors(tokens: int, heads: int, groups: int) -> list[Tensor]:
    torch.manual_seed(0)
    # Values may have another width (DeepSeek's and MiniCPM3's attention).
    shapes = [(1, heads, tokens, 16), (1, groups, tokens, 16), (1, groups, tokens, 12)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def tokens_of(rows: list[int], opening: int) -> int:
    return sum(rows) - opening * (len(rows) - 1)


def alone(qkv: list[Tensor], rows: list[int], opening: int, scaling: float | None) -> Tensor:
    """PyTorch's attention of each whole row; of the openings' results the first."""
    found, start = [], opening
    for number, length in enumerate(rows):
        own = slice(start, start + length - opening)
        whole = [torch.cat([x[:, :, :opening], x[:, :, own]], 2) for x in qkv]
        grouped = qkv[0].shape[1] != qkv[1].shape[1]
        out = scaled_dot_product_attention(
            *whole, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        found.append(out[:, :, opening if number else 0 :])
        start = own.stop
    return torch.cat(found, 2).transpose(1, 2)


@pytest.mark.parametrize(("rows", "opening"), ROWS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_results_and_gradients_are_those_of_each_row_alone(
    rows: list[int], opening: int, heads: int, groups: int, scaling: float | None
) -> None:
    qkv = tensors(tokens_of(rows, opening), heads, groups)
    mine, own = attend(*qkv, rows, opening, scaling), alone(qkv, rows, opening, scaling)
    assert torch.allclose(mine, own, atol=1e-5)
    slope = torch.randn_like(own)
    found = torch.autograd.grad(mine, qkv, slope)
    for a, b in zip(found, torch.autograd.grad(own, qkv, slope), strict=True):
        assert torch.allclose(a, b, atol=3e-5)


@pytest.mark.parametrize(("rows", "opening"), [([200], 0), ([90, 150, 40], 24)])
def test_in_bf16_they_agree_within_its_precision(rows: list[int], opening: int) -> None:
    exact = tensors(tokens_of(rows, opening), 4, 2)
    qkv = [x.detach().bfloat16().requires_grad_() for x in exact]
    mine, own = attend(*qkv, rows, opening, None), alone(exact, rows, opening, None)
    slope = torch.randn_like(own)
    found = [mine.detach(), *torch.autograd.grad(mine, qkv, slope.bfloat16())]
    expected = [own.detach(), *torch.autograd.grad(own, exact, slope)]
    for a, b in zip(found, expected, strict=True):
        assert float((a.float() - b).abs().max()) < 0.03 * float(b.abs().max())


@pytest.mark.parametrize("longest", [300, 2000])
def test_the_shapes_of_products_are_few(longest: int) -> None:
    """Whatever the rows: all but those of the last block, of which there is one in a pack."""
    seen = set()
    for shift in range(20):
        rows = (longest - 100 + shift, 90, longest - 120 - shift, longest)
        seen |= {block.mask.shape for block in _blocks(rows, 24, torch.float32)[:-1]}
    assert len(seen) <= 9  # eight steps, and a block that lies across two rows


def test_blocks_of_the_longest_rows_stay_of_a_bounded_size() -> None:
    """Their scores are [heads, queries, keys]."""
    assert {block.stop - block.start for block in _blocks((9000,), 0, torch.float32)[:-1]} == {512}
