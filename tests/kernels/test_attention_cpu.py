"""Attention in blocks gives what its formula gives for each row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jetson_ft.kernels.attention_cpu import _blocks, blockwise_attention

CPU = torch.device("cpu")
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """Compute attention as its formula is written (Gemma 2's eager one)."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(q.shape[2])
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (window or q.shape[2]))
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return probs @ v.repeat_interleave(groups, 1)


def alone(
    qkv: list[Tensor], rows: list[int], shared_prefix: int, scaling: float | None,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each whole row; of a shared prefix, the first result."""
    outputs, start = [], shared_prefix
    for number, length in enumerate(rows):
        own = slice(start, start + length - shared_prefix)
        whole = [torch.cat([x[:, :, :shared_prefix], x[:, :, own]], 2) for x in qkv]
        out = attend(*whole, scaling or qkv[0].shape[-1] ** -0.5, window, softcap)
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


@pytest.mark.parametrize(("rows", "shared_prefix"), ROWS)
@pytest.mark.parametrize(
    ("window", "softcap"), [(1, None), (15, 5.0), (150, 50.0), (700, None), (None, 5.0)]
)
def test_windows_and_soft_caps_give_the_results_and_gradients_of_each_row_alone(
    rows: list[int], shared_prefix: int, window: int | None, softcap: float | None
) -> None:
    qkv = [x.detach().double() for x in tensors(tokens_of(rows, shared_prefix), 4, 2)]
    qkv = [x.requires_grad_() for x in qkv]
    # The scores' standard deviation is 20, so that both caps matter.
    ours = blockwise_attention(*qkv, rows, shared_prefix, 5.0, 0.0, window, softcap)
    own = alone(qkv, rows, shared_prefix, 5.0, window, softcap)
    grad_output = torch.randn_like(own)
    actual = [ours, *torch.autograd.grad(ours, qkv, grad_output)]
    expected = [own, *torch.autograd.grad(own, qkv, grad_output)]
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def small_tensors() -> list[Tensor]:
    """Return doubles for rows of 4 and 5 tokens that share 2."""
    return [x.detach().double().requires_grad_() for x in tensors(7, 2, 1)]


def test_gradients_with_a_soft_cap_and_a_window_are_checked_numerically() -> None:
    def attention(*qkv: Tensor) -> Tensor:
        return blockwise_attention(*qkv, [4, 5], 2, 0.9, 0.0, 3, 2.0)

    assert torch.autograd.gradcheck(attention, small_tensors(), fast_mode=True)


def test_dropout_is_the_same_forward_and_backward_and_keeps_the_mean() -> None:
    qkv = small_tensors()

    def attention(*qkv: Tensor) -> Tensor:
        torch.manual_seed(7)
        return blockwise_attention(*qkv, [4, 5], 2, 0.9, 0.3, None, 2.0)

    assert torch.autograd.gradcheck(attention, qkv, fast_mode=True)
    with torch.no_grad():
        draws = [blockwise_attention(*qkv, [4, 5], 2, 0.9, 0.3) for _ in range(100)]
        plain = blockwise_attention(*qkv, [4, 5], 2, 0.9)
    assert not torch.equal(draws[0], draws[1])
    assert float((torch.stack(draws).mean(0) - plain).abs().max()) < 0.5


def test_a_window_bounds_the_keys_of_a_block() -> None:
    blocks = _blocks((9000,), 0, 512, torch.float32, CPU)
    assert max(block.mask.shape[1] for block in blocks) <= 2 * 512 + 512


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
        shapes |= {block.mask.shape for block in _blocks(rows, 24, None, torch.float32, CPU)[:-1]}
    assert len(shapes) <= 9  # eight steps, and a block across two rows


def test_blocks_of_the_longest_rows_have_a_bounded_size() -> None:
    """Their scores are [heads, queries, keys]."""
    assert {
        block.stop - block.start for block in _blocks((9000,), 0, None, torch.float32, CPU)[:-1]
    } == {512}
