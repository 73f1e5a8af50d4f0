"""Attention of all rows of a pack in one call, where this PyTorch has the kernels for it.

`torch.nn.attention.varlen` came after the PyTorch that JetPack 6 has, needs kernels that not
every wheel is built with, and has changed its arguments since: so it is tried once on the
device itself, gradients included, and used only if its result is that of row by row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
    if not works(query.dtype, query.shape[-1], query.shape[1] // key.shape[1]):
        return None
    return _call(query, key, value, row_lengths, scaling)


@lru_cache
def works(dtype: torch.dtype, head_dim: int, queries_per_key: int, device: str = "cuda") -> bool:
    """Whether the kernels give, for two short rows, what each row gives alone."""
    with torch.inference_mode(False), torch.enable_grad():  # who asks first may be measuring
        return _work(dtype, head_dim, queries_per_key, device)


def _work(dtype: torch.dtype, head_dim: int, queries_per_key: int, device: str) -> bool:
    shapes = [(1, heads, 5, head_dim) for heads in (queries_per_key, 1, 1)]
    random = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=random).to(device, dtype).requires_grad_() for shape in shapes
    ]
    try:
        query, key, value = tensors
        together = _call(query, key, value, [2, 3], None)
        found = [together, *torch.autograd.grad(together.sum(), tensors)]
    except (RuntimeError, TypeError, ValueError, NotImplementedError, ImportError):
        return False
    rows = zip(*(tensor.split([2, 3], 2) for tensor in tensors), strict=True)
    alone = torch.cat([_one_row(q, k, v) for q, k, v in rows], 2).transpose(1, 2)
    expected = [alone, *torch.autograd.grad(alone.sum(), tensors)]
    return all(
        torch.allclose(a.float(), b.float(), atol=0.05)
        for a, b in zip(found, expected, strict=True)
    )


def _one_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _call(
    query: Tensor, key: Tensor, value: Tensor, row_lengths: list[int], scaling: float | None
) -> Tensor:
    bounds, longest = _bounds(tuple(row_lengths), query.device), max(row_lengths)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, …]
    kernel = _kernel()
    takes, options = _takes(kernel), dict[str, Any]()
    options |= {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "scale" in takes:
        options["scale"] = scaling
    elif scaling is not None:  # the kernel divides by the root of the width
        q = q * (scaling * q.shape[-1] ** 0.5)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
    out: Tensor = kernel(q, k, v, bounds, bounds, longest, longest, **options)
    return out[None]


@lru_cache
def _takes(kernel: Callable[..., Tensor]) -> frozenset[str]:
    """Its arguments: 2.10 has `is_causal`; 2.11 a window and a scale; 2.12 grouped heads."""
    return frozenset(inspect.signature(kernel).parameters)


def _kernel() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn  # type: ignore[no-any-return]


@lru_cache(maxsize=2)
def _bounds(row_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[rows + 1] int32, made once for all layers of a pack."""
    return torch.tensor([0, *row_lengths]).cumsum(0).to(device, torch.int32)
