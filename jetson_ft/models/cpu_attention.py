"""Causal attention of packed rows on a CPU, forward and backward, made of large products.

PyTorch's own works on tiles so small that the matrix units are half idle, and takes each row by
itself. Here a block of queries, whichever rows they are of, meets all the keys that any of them
may see, at once; the softmax is made again in the backward pass instead of kept (as in Dao et
al. 2022, FlashAttention, section 3.1).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_QUERIES = 128  # in a block; measured best between 64 and 256 for rows of 128 to 512
# Numbers of keys come in steps, few for the longest row, as each new shape has its price
# (docs/decisions/0009).
_STEP, _STEPS, _LARGEST_STEP = 64, 8, 512


def attend(
    query: Tensor, key: Tensor, value: Tensor,
    row_lengths: list[int], opening: int, scaling: float | None,
) -> Tensor:  # fmt: skip
    """Attention within each row; see `attention.packed_attention`.

    Args:
        query: [1, heads, tokens, head_dim]; key and value may have fewer heads, and value heads
            another width.

    Returns:
        [1, tokens, heads, head_dim of value]
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks = _blocks(tuple(row_lengths), opening, query.dtype)
    out: Tensor = _Attention.apply(query, key, value, scale, blocks)
    return out


class _Block(NamedTuple):
    """Queries `start` to `stop`, and the keys they meet: the opening, then `first` to `stop`."""

    start: int
    stop: int
    opening: int
    first: int
    mask: Tensor  # [queries, keys], -inf where a query doesn't see a key, else 0

    def queries(self, tensor: Tensor, groups: int) -> Tensor:
        """[groups, heads of a group x queries, width], of [heads, tokens, width]: query heads
        that share a key head lie behind one another, so that one product serves all."""
        part = tensor[:, self.start : self.stop]
        return part.reshape(groups, len(tensor) // groups * part.shape[1], -1)

    def keys(self, tensor: Tensor) -> Tensor:
        """[groups, keys, width], of [groups, tokens, width]."""
        own = tensor[:, self.first : self.stop]
        return torch.cat((tensor[:, : self.opening], own), 1) if self.opening else own

    def chances(self, query: Tensor, key: Tensor) -> Tensor:
        """Softmax of the scores, [groups, heads of a group x queries, keys]."""
        scores = torch.bmm(query, key.transpose(1, 2))
        # Adding takes a quarter of the time of `masked_fill_` with the mask itself.
        by_head = scores.view(-1, *self.mask.shape).add_(self.mask)
        return torch.softmax(by_head, -1).view_as(scores)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ right, [groups, keys, width], to the rows of `total` that are its keys."""
        found = torch.bmm(left.transpose(1, 2), right)
        if self.opening:
            total[:, : self.opening] += found[:, : self.opening]
        total[:, self.first : self.stop] += found[:, self.opening :]


@lru_cache(maxsize=1)  # every layer of a pack asks for the same
def _blocks(row_lengths: tuple[int, ...], opening: int, dtype: torch.dtype) -> list[_Block]:
    own = torch.tensor([length - (opening if row else 0) for row, length in enumerate(row_lengths)])
    row_of = torch.arange(len(own)).repeat_interleave(own)
    starts = (own.cumsum(0) - own)[row_of].tolist()  # of each token's row
    tokens = len(row_of)
    step = min(_STEP * math.ceil(max(row_lengths) / (_STEP * _STEPS)), _LARGEST_STEP)
    size = max(_QUERIES, step)
    blocks = []
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        round_up = -(opening + stop - starts[start]) % step
        first = starts[start] - round_up
        shared, first = (opening, first) if first > opening else (0, 0)
        seen = torch.cat((torch.arange(shared), torch.arange(first, stop)))
        asks = torch.arange(start, stop)[:, None]
        sees = (seen <= asks) & ((row_of[seen] == row_of[asks]) | (seen < opening))
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))
        blocks.append(_Block(start, stop, shared, first, mask))
    return blocks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: list[_Block]
    ) -> Tensor:
        query = (query.squeeze(0) * scale).contiguous()
        key, value = key.squeeze(0).contiguous(), value.squeeze(0).contiguous()
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.blocks = scale, blocks
        heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        for block in blocks:
            chances = block.chances(block.queries(query, len(key)), block.keys(key))
            found = torch.bmm(chances, block.keys(value)).view(heads, -1, out.shape[-1])
            out[0, block.start : block.stop] = found.transpose(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        d_out = d_out.squeeze(0).transpose(0, 1)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            q, d_o = block.queries(query, len(key)), block.queries(d_out, len(key))
            k = block.keys(key)
            chances = block.chances(q, k)
            d_chances = torch.bmm(d_o, block.keys(value).transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_chances, chances, -1, chances.dtype)
            block.add(d_value, chances, d_o)
            block.add(d_key, d_scores, q)
            d_q = torch.bmm(d_scores, k).mul_(ctx.scale)
            d_query[:, block.start : block.stop] = d_q.view(len(query), -1, query.shape[-1])
        return d_query[None], d_key[None], d_value[None], None, None
