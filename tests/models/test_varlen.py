"""All rows in one call: taken where the kernels prove themselves, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from jetson_ft.models import varlen
from jetson_ft.models.attention import packed_attention


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    varlen.choose.cache_clear()
    yield
    varlen.choose.cache_clear()


def kernel(
    q: Any, k: Any, v: Any, bounds: Any, longest: int, scaling: float | None
) -> torch.Tensor:
    """What PyTorch documents of its own, without its kernels."""
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
@pytest.mark.parametrize("found", [leaky, unscaled, missing])
def test_only_kernels_that_keep_rows_apart_are_used(
    found: Any, queries_per_key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_KERNELS", (found,))
    assert varlen.choose(torch.bfloat16, 16, queries_per_key, "cpu") is None
    varlen.choose.cache_clear()
    monkeypatch.setattr(varlen, "_KERNELS", (found, kernel))
    assert varlen.choose(torch.bfloat16, 16, queries_per_key, "cpu") is kernel


def test_each_grouping_of_heads_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_KERNELS", (ungrouped, kernel))
    assert varlen.choose(torch.bfloat16, 16, 1, "cpu") is ungrouped
    assert varlen.choose(torch.bfloat16, 16, 3, "cpu") is kernel


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_the_trial_is_the_same_where_no_gradients_are_wanted(
    quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_KERNELS", (kernel,))
    with quiet():
        assert varlen.choose(torch.bfloat16, 16, 1, "cpu") is kernel


def test_without_a_gpu_rows_are_taken_one_by_one() -> None:
    assert varlen.choose(torch.bfloat16, 16, 1, "cpu") is None  # the wheel's own want a GPU
    query = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    assert varlen.attend(query, query, query, [2, 3], None) is None


def test_both_are_called_as_this_pytorch_declares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU can tell: what they refuse is the device, not the arguments."""
    q = torch.randn(5, 2, 16, dtype=torch.bfloat16)
    for one in varlen._KERNELS:
        with pytest.raises((RuntimeError, ImportError)) as refused:
            one(q, q, q, torch.tensor([0, 2, 5]).int(), 3, 0.2)
        assert isinstance(refused.value, ImportError) or "CPU" in str(refused.value)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_in_its_place_the_result_is_the_same(heads: int, scaling: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, count, 9, 16) for count in (heads, 2, 2))
    own, _ = packed_attention(None, query, key, value, None, scaling=scaling, row_lengths=[4, 5])
    found = varlen._call(kernel, query, key, value, [4, 5], scaling)
    assert torch.allclose(found, own, atol=1e-6)
    assert found.shape == own.shape == (1, 9, heads, 16)
