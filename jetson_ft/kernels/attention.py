"""Attention that stays inside each row of a packed sequence.

A pack (`packing.Pack`) is one sequence of rows without padding. The model's forward passes
`row_lengths` on to attention, and `shared_prefix`, the number of tokens that all rows share.
transformers gets the function below by the name it is registered under, so no model code changes.
`attention_trial` decides for which models this is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKED_ATTENTION = "jetson_ft_packed"
_BLOCKWISE_DEVICES = ("cpu",)

# Arguments that models pass to every attention function and that change nothing in its result.
_WITHOUT_EFFECT = {
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class WindowMask:
    """The mask of a layer with a sliding window; stands for the tensor, which is never made."""

    window: int  # tokens a position may look back, itself included


class PackingError(ValueError):
    """The model's attention takes arguments that packed attention doesn't compute."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = ", ".join(arguments)
        super().__init__(f"packed attention doesn't compute {self.arguments}")


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_lengths: list[int] | None = None,
    shared_prefix: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    one_by_one: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each row: [1, tokens, heads, head_dim], and no weights.

    Args:
        query: [1, heads, tokens, head_dim]; key and value may have fewer heads.
        shared_prefix: tokens that all rows begin with; the sequence starts with one copy of them.
        attention_mask: None, or the `WindowMask` of a layer with a sliding window.
        softcap: bound of the scores: they become softcap * tanh(scores / softcap).
        one_by_one: multiply no number of a row with one of another row, not even by zero.

    Raises:
        PackingError: an argument would change the result (masks, sinks, position biases).
    """
    if row_lengths is None:
        raise ValueError("packed attention was called without row_lengths")
    # The mask has the window that the model's own attention applies; the argument may be missing.
    window = attention_mask.window if isinstance(attention_mask, WindowMask) else None
    unknown = [k for k, v in others.items() if v is not None and k not in _WITHOUT_EFFECT]
    if attention_mask is not None and window is None:
        unknown.append("attention_mask")
    if sliding_window not in (None, window):
        unknown.append("sliding_window")
    tokens = sum(row_lengths) - shared_prefix * (len(row_lengths) - 1)
    if {tensor.shape[2] for tensor in (query, key, value)} != {tokens}:
        unknown.append("key")  # of more or fewer tokens than the pack
    if unknown:
        raise PackingError(unknown)
    import torch

    from jetson_ft.kernels.attention_cpu import blockwise_attention
    from jetson_ft.kernels.attention_varlen import varlen_attention

    if window is not None and max(row_lengths) <= window:
        window = None
    attend = partial(
        blockwise_attention, scaling=scaling, dropout=dropout, sliding_window=window,
        softcap=softcap,
    )  # fmt: skip
    use_blocks = softcap is not None or query.device.type in _BLOCKWISE_DEVICES
    if use_blocks and not one_by_one:
        return attend(query, key, value, row_lengths, shared_prefix), None
    if shared_prefix:
        tensors = (query, key, value)
        query, key, value = (_unshare(each, row_lengths, shared_prefix) for each in tensors)
    out = None
    if use_blocks:
        # `split` and not slices: the gradient of a slice is a whole tensor of zeros around it.
        rows = zip(*(tensor.split(row_lengths, 2) for tensor in (query, key, value)), strict=True)
        out = torch.cat([attend(q, k, v, [q.shape[2]], 0) for q, k, v in rows], 1)
    elif not (dropout or window or one_by_one):
        out = varlen_attention(query, key, value, row_lengths, scaling)
    if out is None:
        out = _row_by_row(query, key, value, row_lengths, scaling, dropout, window)
    if shared_prefix:  # of the copies of the prefix, keep the first row's
        sizes = [size for length in row_lengths for size in (shared_prefix, length - shared_prefix)]
        first, *rest = out.split(sizes, 1)
        out = torch.cat([first, *rest[::2]], 1)
    return out, None


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    row_lengths: list[int], scaling: float | None, dropout: float, sliding_window: int | None,
) -> torch.Tensor:  # fmt: skip
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    results = []
    rows = (tensor.split(row_lengths, 2) for tensor in (query, key, value))
    for q, k, v in zip(*rows, strict=True):
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            position = torch.arange(length, device=q.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        results.append(scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ))  # fmt: skip
    return torch.cat(results, 2).transpose(1, 2).contiguous()


def _unshare(tensor: torch.Tensor, row_lengths: list[int], shared_prefix: int) -> torch.Tensor:
    """Return each row with its own copy of the prefix: [1, heads, tokens of the rows, head_dim]."""
    import torch

    sizes = [shared_prefix, *(length - shared_prefix for length in row_lengths)]
    prefix, *rows = tensor.split(sizes, 2)
    return torch.cat([part for row in rows for part in (prefix, row)], 2)


def use_packed_attention(model: Any) -> AbstractContextManager[None]:
    """Make `packed_attention` the model's attention within the context."""
    return use_attention(model, PACKED_ATTENTION, packed_attention, _make_mask)


@contextmanager
def use_attention(
    model: Any, name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]
) -> Iterator[None]:
    """Make a function the model's attention within the context.

    Args:
        name: that the functions are registered under.
        attend: as `transformers.AttentionInterface` calls it.
        make_mask: returns the mask that it gets, as `transformers.AttentionMaskInterface` calls it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _make_mask(
    *_: Any, config: Any = None, local_size: int | None = None, use_vmap: bool = False, **__: Any
) -> WindowMask | None:
    """Return the mask of a layer; None: causal.

    Raises:
        PackingError: attention in chunks, or a mask by a function of the model's own.
    """
    if use_vmap or local_size not in (None, getattr(config, "sliding_window", None)):
        raise PackingError(["attention_mask"])
    return None if local_size is None else WindowMask(local_size)
