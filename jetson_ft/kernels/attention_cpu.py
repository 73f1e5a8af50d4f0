"""Causal attention of packed rows, forward and backward, in large matrix products.

PyTorch's own attention works on tiles that leave half of a CPU's matrix units idle, takes one row
at a time, and has no soft cap on any device. Here a block of queries, of any rows, is multiplied
at once by all keys that any of them attends to. The backward pass recomputes the softmax (as in
Dao et al. 2022, FlashAttention, section 3.1), so the scores of one block exist at a time.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_QUERIES = 128  # in a block; measured best between 64 and 256 for rows of 128 to 512
# The number of keys is rounded up to a multiple. Few distinct numbers are wanted, as oneDNN builds
# a kernel for each new shape.
_KEY_MULTIPLE, _MULTIPLES_PER_ROW, _MAX_KEY_MULTIPLE = 64, 8, 512


class _Settings(NamedTuple):
    scale: float  # of the scores
    softcap: float | None
    dropout: float  # share of the probabilities that become 0
    seed: int  # of the dropout


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor,
    row_lengths: list[int], shared_prefix: int, scaling: float | None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Compute `attention.packed_attention`: [1, tokens, heads, width of the value's heads]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    seed = int(torch.randint(2**62, ())) if dropout else 0
    blocks = _blocks(tuple(row_lengths), shared_prefix, sliding_window, query.dtype, query.device)
    settings = _Settings(scale, softcap, dropout, seed)
    return _Attention.apply(query, key, value, blocks, settings)


class _Block(NamedTuple):
    """Queries `start` to `stop`, and their keys: the shared prefix, then `first` to `stop`."""

    start: int
    stop: int
    shared_prefix: int
    first: int
    mask: Tensor  # [queries, keys], 0 where a query attends to a key, else -inf

    def queries(self, tensor: Tensor, groups: int) -> Tensor:
        """Return [groups, heads of a group x queries, width] from [heads, tokens, width].

        Query heads that share a key head are adjacent, so that one product serves all.
        """
        part = tensor[:, self.start : self.stop]
        return part.reshape(groups, len(tensor) // groups * part.shape[1], -1)

    def keys(self, tensor: Tensor) -> Tensor:
        """Return [groups, keys, width] from [groups, tokens, width]."""
        part = tensor[:, self.first : self.stop]
        return torch.cat((tensor[:, : self.shared_prefix], part), 1) if self.shared_prefix else part

    def probs(
        self, query: Tensor, key: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the softmax of the scores, [groups, heads of a group x queries, keys].

        With a soft cap (Gemma 2) the scores are `softcap` tanh(scores / `softcap`); return that
        hyperbolic tangent too.
        """
        scores, tanh = torch.bmm(query, key.transpose(1, 2)), None
        if softcap is not None:
            tanh = scores.div_(softcap).tanh_()
            scores = tanh * softcap
        # Adding takes a quarter of the time of `masked_fill_` with the mask itself.
        by_head = scores.view(-1, *self.mask.shape).add_(self.mask)
        return torch.softmax(by_head, -1).view_as(scores), tanh

    def keep(self, probs: Tensor, settings: _Settings) -> Tensor:
        """Return dropout's factor for each probability, 0 or 1 / (1 - dropout); each call alike."""
        generator = torch.Generator(probs.device).manual_seed(settings.seed + self.start)
        kept = torch.empty_like(probs).bernoulli_(1 - settings.dropout, generator=generator)
        return kept.div_(1 - settings.dropout)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ right, [groups, keys, width], to the rows of `total` for the block's keys."""
        product = torch.bmm(left.transpose(1, 2), right)
        if self.shared_prefix:
            total[:, : self.shared_prefix] += product[:, : self.shared_prefix]
        total[:, self.first : self.stop] += product[:, self.shared_prefix :]


@lru_cache(maxsize=2)  # the layers of a pack have the same blocks, or two kinds: with a window
def _blocks(
    row_lengths: tuple[int, ...], shared_prefix: int, sliding_window: int | None,
    dtype: torch.dtype, device: torch.device,
) -> list[_Block]:  # fmt: skip
    lengths = torch.tensor(row_lengths) - shared_prefix  # in the pack
    lengths[0] = row_lengths[0]
    row_of = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = (lengths.cumsum(0) - lengths)[row_of]  # of each token's row
    tokens = len(row_of)
    position = torch.arange(tokens) - starts + shared_prefix * (row_of > 0)  # in the row
    window = sliding_window or tokens
    multiple = _KEY_MULTIPLE * math.ceil(max(row_lengths) / (_KEY_MULTIPLE * _MULTIPLES_PER_ROW))
    multiple = min(multiple, _MAX_KEY_MULTIPLE)
    size = max(_QUERIES, multiple)
    blocks = []
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        first = max(int(starts[start]), start - window + 1)  # that a query attends to
        first -= -(shared_prefix + stop - first) % multiple
        # A `first` that falls into the prefix, or is negative: the keys are all tokens from 0.
        shared, first = (shared_prefix, first) if first > shared_prefix else (0, 0)
        keys = torch.cat((torch.arange(shared), torch.arange(first, stop)))
        queries = torch.arange(start, stop)[:, None]
        same_row = (row_of[keys] == row_of[queries]) | (keys < shared_prefix)
        attends = (keys <= queries) & same_row & (position[queries] - position[keys] < window)
        mask = torch.zeros(attends.shape, dtype=dtype).masked_fill_(~attends, float("-inf"))
        blocks.append(_Block(start, stop, shared, first, mask.to(device)))
    return blocks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[_Block],
        settings: _Settings,
    ) -> Tensor:  # fmt: skip
        query = (query.squeeze(0) * settings.scale).contiguous()
        key, value = key.squeeze(0).contiguous(), value.squeeze(0).contiguous()
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.settings = blocks, settings
        heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        for block in blocks:
            q, k = block.queries(query, len(key)), block.keys(key)
            probs, _tanh = block.probs(q, k, settings.softcap)
            if settings.dropout:
                probs *= block.keep(probs, settings)
            result = torch.bmm(probs, block.keys(value)).view(heads, -1, out.shape[-1])
            out[0, block.start : block.stop] = result.transpose(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        settings = ctx.settings
        d_out = d_out.squeeze(0).transpose(0, 1)
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for block in ctx.blocks:
            q, d_o = block.queries(query, len(key)), block.queries(d_out, len(key))
            k = block.keys(key)
            probs, tanh = block.probs(q, k, settings.softcap)
            d_probs = torch.bmm(d_o, block.keys(value).transpose(1, 2))
            kept = probs
            if settings.dropout:
                keep = block.keep(probs, settings)
                kept, d_probs = probs * keep, d_probs.mul_(keep)
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            if tanh is not None:
                d_scores.mul_(1 - tanh.square_())
            block.add(d_value, kept, d_o)
            block.add(d_key, d_scores, q)
            d_q = torch.bmm(d_scores, k).mul_(settings.scale)
            d_query[:, block.start : block.stop] = d_q.view(len(query), -1, query.shape[-1])
        return d_query[None], d_key[None], d_value[None], None, None
