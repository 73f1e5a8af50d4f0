"""All rows in one call: taken where the kernels prove themselves, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jetson_ft.kernels import attention_varlen
from jetson_ft.kernels.attention import packed_attention


@pytest.fixture(autouse=True)
def _clear_cache() -> Iterator[None]:
    attention_varlen.choose_kernel.cache_clear()
    yield
    attention_varlen.choose_kernel.cache_clear()


def kernel(
    q: Any, k: Any, v: Any, bounds: Any, longest: int, scaling: float | None
) -> torch.Tensor:
    """Compute what PyTorch documents for its kernel, row by row."""
    assert bounds.dtype == torch.int32
    assert longest == max(b - a for a, b in pairwise(bounds.tolist()))
    rows = [
        scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)),
            is_causal=True, scale=scaling, enable_gqa=True,
        )[0].transpose(0, 1)
        for a, b in pairwise(bounds.tolist())
    ]  # fmt: skip
    return torch.cat(rows)


def leaky(q: Any, k: Any, v: Any, bounds: Any, longest: int, scaling: Any) -> torch.Tensor:
    """Rows that see each other."""
    return kernel(q, k, v, torch.tensor([0, len(q)]).int(), len(q), scaling)


def unscaled(q: Any, k: Any, v: Any, bounds: Any, longest: int, scaling: Any) -> torch.Tensor:
    return kernel(q, k, v, bounds, longest, None)


def missing(*_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


def ungrouped(q: Any, k: Any, *more: Any) -> torch.Tensor:
    """PyTorch 2.11 takes as many heads of keys as of queries alone."""
    if q.shape != k.shape:
        raise TypeError("varlen_attn() got an unexpected keyword argument 'enable_gqa'")
    return kernel(q, k, *more)


@pytest.mark.parametrize("queries_per_key", [1, 3])
@pytest.mark.parametrize("faulty", [leaky, unscaled, missing])
def test_only_kernels_that_keep_rows_apart_are_used(
    faulty: Any, queries_per_key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_varlen, "_KERNELS", (faulty,))
    assert attention_varlen.choose_kernel(torch.bfloat16, 16, queries_per_key, "cpu") is None
    attention_varlen.choose_kernel.cache_clear()
    monkeypatch.setattr(attention_varlen, "_KERNELS", (faulty, kernel))
    assert attention_varlen.choose_kernel(torch.bfloat16, 16, queries_per_key, "cpu") is kernel


def test_lack_of_memory_in_the_trial_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention_varlen, "_KERNELS", (lack_memory, kernel))
    with pytest.raises(torch.OutOfMemoryError):
        attention_varlen.choose_kernel(torch.bfloat16, 16, 1, "cpu")


def test_each_grouping_of_heads_gets_its_own_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_varlen, "_KERNELS", (ungrouped, kernel))
    assert attention_varlen.choose_kernel(torch.bfloat16, 16, 1, "cpu") is ungrouped
    assert attention_varlen.choose_kernel(torch.bfloat16, 16, 3, "cpu") is kernel


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_the_trial_without_gradients_gives_the_same_kernel(
    quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_varlen, "_KERNELS", (kernel,))
    with quiet():
        assert attention_varlen.choose_kernel(torch.bfloat16, 16, 1, "cpu") is kernel


def test_without_a_gpu_there_is_no_kernel() -> None:
    assert (
        attention_varlen.choose_kernel(torch.bfloat16, 16, 1, "cpu") is None
    )  # the wheel's own want a GPU
    query = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    assert attention_varlen.varlen_attention(query, query, query, [2, 3], None) is None


def test_both_kernels_are_called_as_this_pytorch_declares_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as a CPU can tell: what they refuse is the device, not the arguments."""
    q = torch.randn(5, 2, 16, dtype=torch.bfloat16)
    for one in attention_varlen._KERNELS:
        with pytest.raises((RuntimeError, ImportError)) as refused:
            one(q, q, q, torch.tensor([0, 2, 5]).int(), 3, 0.2)
        assert isinstance(refused.value, ImportError) or "CPU" in str(refused.value)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_kernel_gives_the_result_of_row_by_row(heads: int, scaling: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, count, 9, 16) for count in (heads, 2, 2))
    own, _ = packed_attention(None, query, key, value, None, scaling=scaling, row_lengths=[4, 5])
    actual = attention_varlen._call(kernel, query, key, value, [4, 5], scaling)
    assert torch.allclose(actual, own, atol=1e-6)
    assert actual.shape == own.shape == (1, 9, heads, 16)
