"""Attention of all rows of a pack in one call, where this PyTorch has the kernels for it.

`torch.nn.attention.varlen` is newer than JetPack 6's PyTorch and changes with each release; the
operation that it calls exists in all. Each is tried once on the device, gradients included, and
used only if it gives the result of one call per row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

# query, key and value, each [tokens, heads, head_dim]; bounds of the rows; the longest; scaling
_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, row_lengths: list[int], scaling: float | None
) -> Tensor | None:
    """Compute `attention.packed_attention` of whole rows; None where the kernels are missing."""
    is_supported = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    if not is_supported or query.shape[-1] != value.shape[-1]:
        return None
    kernel = choose_kernel(query.dtype, query.shape[-1], query.shape[1] // key.shape[1])
    return _call(kernel, query, key, value, row_lengths, scaling) if kernel else None


@lru_cache
def choose_kernel(
    dtype: torch.dtype, head_dim: int, queries_per_key: int, device: str = "cuda"
) -> _Kernel | None:
    """Return the first kernel that gives, for two short rows, what each row gives alone."""
    with torch.inference_mode(False), torch.enable_grad():  # the caller may have disabled gradients
        for kernel in _KERNELS:
            if _works(kernel, dtype, head_dim, queries_per_key, device):
                logger.debug("attention of packed rows: %s", kernel.__name__)
                return kernel
    return None


def _works(
    kernel: _Kernel, dtype: torch.dtype, head_dim: int, queries_per_key: int, device: str
) -> bool:
    tensors, random = [], torch.Generator().manual_seed(0)
    for heads in (2 * queries_per_key, 2, 2):
        tensor = torch.randn((1, heads, 5, head_dim), generator=random)
        tensors.append(tensor.to(device, dtype).requires_grad_())
    try:
        query, key, value = tensors
        together = _call(kernel, query, key, value, [2, 3], 0.2)
        results = [together, *torch.autograd.grad(together.sum(), tensors)]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError) as error:
        logger.debug("%s can't be used: %r", kernel.__name__, error)
        return False
    rows = zip(*(tensor.split([2, 3], 2) for tensor in tensors), strict=True)
    attend = partial(scaled_dot_product_attention, is_causal=True, scale=0.2, enable_gqa=True)
    alone = torch.cat([attend(*row) for row in rows], 2).transpose(1, 2)
    expected = [alone, *torch.autograd.grad(alone.sum(), tensors)]
    pairs = zip(results, expected, strict=True)
    return all(torch.allclose(a.float(), b.float(), atol=0.05) for a, b in pairs)


def _call(
    kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor,
    row_lengths: list[int], scaling: float | None,
) -> Tensor:  # fmt: skip
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = _bounds(tuple(row_lengths), query.device)
    return kernel(q, k, v, bounds, max(row_lengths), scaling)[None]


@lru_cache(maxsize=2)
def _bounds(row_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the bounds [rows + 1], int32; computed once for all layers of a pack."""
    return torch.tensor([0, *row_lengths]).cumsum(0).to(device, torch.int32)


def _varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    return varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **grouped
    )


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """Call the operation that `varlen_attn` calls; PyTorch 2.8 has it too."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
    )[0]


_KERNELS: tuple[_Kernel, ...] = (_varlen_attn, _flash_attention)
