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
    varlen.works.cache_clear()
    yield
    varlen.works.cache_clear()


def kernel(
    q: Any, k: Any, v: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What PyTorch documents of `varlen_attn`, without its kernels."""
    assert window_size == (-1, 0)
    assert bounds.dtype == torch.int32
    assert longest == max(b - a for a, b in pairwise(bounds.tolist()))
    rows = [
        scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)),
            is_causal=True, scale=scale, enable_gqa=enable_gqa,
        )[0].transpose(0, 1)
        for a, b in pairwise(bounds.tolist())
    ]  # fmt: skip
    return torch.cat(rows)


def kernel_of_2_11(
    q: Any, k: Any, v: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """The same, for as many keys as queries."""
    assert q.shape == k.shape == v.shape
    return kernel(
        q, k, v, bounds, bounds_k, longest, longest_k, scale=scale, window_size=window_size
    )


def kernel_of_2_10(
    q: Any, k: Any, v: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int,
    is_causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The same with the usual scale alone."""
    assert is_causal
    return kernel_of_2_11(q, k, v, bounds, bounds_k, longest, longest_k, window_size=(-1, 0))


def leaky(
    q: Any, k: Any, v: Any, bounds: Any, bounds_k: Any, longest: int, longest_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rows that see each other."""
    bounds, longest = torch.tensor([0, len(q)]).int(), len(q)
    return kernel(
        q, k, v, bounds, bounds, longest, longest,
        scale=scale, window_size=window_size, enable_gqa=enable_gqa,
    )  # fmt: skip


def missing(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("queries_per_key", [1, 3])
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (kernel, True),
        (kernel_of_2_11, True),
        (kernel_of_2_10, True),
        (leaky, False),
        (missing, False),
    ],
)
def test_only_kernels_that_keep_rows_apart_are_used(
    found: Any, expected: bool, queries_per_key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: found)
    assert varlen.works(torch.bfloat16, 16, queries_per_key, "cpu") is expected


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_the_trial_is_the_same_where_no_gradients_are_wanted(
    quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: kernel)
    with quiet():
        assert varlen.works(torch.bfloat16, 16, 1, "cpu")


def test_without_a_gpu_rows_are_taken_one_by_one() -> None:
    assert not varlen.works(torch.bfloat16, 16, 1, "cpu")  # the wheel's own, which want a GPU
    query = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    assert varlen.attend(query, query, query, [2, 3], None) is None


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("found", [kernel, kernel_of_2_11, kernel_of_2_10])
def test_in_its_place_the_result_is_the_same(
    found: Any, heads: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, count, 9, 16) for count in (heads, 2, 2))
    arguments = (None, query, key, value, None)
    own, _ = packed_attention(*arguments, scaling=scaling, row_lengths=[4, 5])
    monkeypatch.setattr(varlen, "_kernel", lambda: found)
    result = varlen._call(query, key, value, [4, 5], scaling)
    assert torch.allclose(result, own, atol=1e-6)
    assert result.shape == own.shape == (1, 9, heads, 16)
