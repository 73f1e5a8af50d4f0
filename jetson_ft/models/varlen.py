"""Attention of all rows of a pack in one call, where this PyTorch has the kernels for it.

`torch.nn.attention.varlen` came after the PyTorch that JetPack 6 has, takes other arguments in
each release, and needs kernels that not every wheel is built with. Below it lies an operation
that all of them have. Each is tried once on the device itself, gradients included, and used only
if its result is that of row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# query, key and value, each [tokens, heads, head_dim]; bounds of the rows; the longest; scaling
_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]


def attend(
    query: Tensor, key: Tensor, value: Tensor, row_lengths: list[int], scaling: float | None
) -> Tensor | None:
    """Causal attention within each row; None where the kernels are missing.

    Args:
        query: [1, heads, tokens, head_dim]; key and value may have fewer heads.

    Returns:
        [1, tokens, heads, head_dim], or None.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    if query.shape[-1] != value.shape[-1]:
        return None
    kernel = choose(query.dtype, query.shape[-1], query.shape[1] // key.shape[1])
    return _call(kernel, query, key, value, row_lengths, scaling) if kernel else None


@lru_cache
def choose(
    dtype: torch.dtype, head_dim: int, queries_per_key: int, device: str = "cuda"
) -> _Kernel | None:
    """The first of the kernels that gives, for two short rows, what each row gives alone."""
    with torch.inference_mode(False), torch.enable_grad():  # its first caller may want no gradients
        found = (one for one in _KERNELS if _works(one, dtype, head_dim, queries_per_key, device))
        return next(found, None)


def _works(
    kernel: _Kernel, dtype: torch.dtype, head_dim: int, queries_per_key: int, device: str
) -> bool:
    shapes = [(1, heads, 5, head_dim) for heads in (2 * queries_per_key, 2, 2)]
    random = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes
    ]
    try:
        query, key, value = tensors
        together = _call(kernel, query, key, value, [2, 3], 0.2)
        found = [together, *torch.autograd.grad(together.sum(), tensors)]
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError):
        return False
    rows = zip(*(tensor.split([2, 3], 2) for tensor in tensors), strict=True)
    alone = torch.cat([_one_row(q, k, v) for q, k, v in rows], 2).transpose(1, 2)
    expected = [alone, *torch.autograd.grad(alone.sum(), tensors)]
    return all(
        torch.allclose(a.float(), b.float(), atol=0.05)
        for a, b in zip(found, expected, strict=True)
    )


def _one_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    )


def _call(
    kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor,
    row_lengths: list[int], scaling: float | None,
) -> Tensor:  # fmt: skip
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = _bounds(tuple(row_lengths), query.device)
    return kernel(q, k, v, bounds, max(row_lengths), scaling)[None]


@lru_cache(maxsize=2)
def _bounds(row_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[rows + 1] int32, made once for all layers of a pack."""
    return torch.tensor([0, *row_lengths]).cumsum(0).to(device, torch.int32)


def _public(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    out: Tensor = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **grouped
    )
    return out


def _below(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """The operation that `varlen_attn` stands on; PyTorch 2.8 has it too."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
    )[0]
    return out


_KERNELS: tuple[_Kernel, ...] = (_public, _below)
