"""Causal attention of one row on a CPU, with a backward pass made of large products.

The forward pass is PyTorch's own. Its backward pass works on tiles so small that the matrix
units are half idle; here a block of queries meets all the keys it may see at once, and the
softmax is made again instead of kept (as in Dao et al. 2022, FlashAttention, section 3.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_BLOCK = 128  # queries at a time; measured best between 64 and 256 for rows of 128 to 512


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """[1, heads, tokens, head_dim] (key and value may have fewer heads) to the query's shape."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _CausalAttention.apply(query, key, value, scale)
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        query, key, value = (tensor.squeeze(0) for tensor in ctx.saved_tensors)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        above = torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=query.dtype).triu_(1)
        for start in range(0, query.shape[1], _BLOCK):
            block = slice(start, min(start + _BLOCK, query.shape[1]))
            d_query[:, block] = _block_backward(
                query, key, value, d_out.squeeze(0), block, above, ctx.scale, d_key, d_value
            )
        d_query, d_key = d_query.mul_(ctx.scale), d_key.mul_(ctx.scale)
        return d_query[None], d_key[None], d_value[None], None


def _block_backward(
    query: Tensor, key: Tensor, value: Tensor, d_out: Tensor,
    block: slice, above: Tensor, scale: float, d_key: Tensor, d_value: Tensor,
) -> Tensor:  # fmt: skip
    """The unscaled query gradient of a block, [heads, block, head_dim]; adds to the others.

    Query heads that share a key head lie behind one another, so that one product serves all.
    """
    heads, size, seen = len(query), block.stop - block.start, block.stop
    groups, width = len(key), query.shape[-1]

    def stacked(tensor: Tensor) -> Tensor:
        return tensor[:, block].reshape(groups, heads // groups * size, width)

    q, d_o, k, v = stacked(query), stacked(d_out), key[:, :seen], value[:, :seen]
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(heads, size, seen)
    scores[:, :, block] += above[:size, :size]
    chances = torch.softmax(scores, -1)
    d_chances = torch.bmm(d_o, v.transpose(1, 2)).view(heads, size, seen)
    d_scores = torch._softmax_backward_data(d_chances, chances, -1, chances.dtype)
    d_scores = d_scores.view(groups, -1, seen)
    d_value[:, :seen].baddbmm_(chances.view(groups, -1, seen).transpose(1, 2), d_o)
    d_key[:, :seen].baddbmm_(d_scores.transpose(1, 2), q)
    return torch.bmm(d_scores, k).view(heads, size, width)
