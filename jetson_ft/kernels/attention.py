"""Attention that stays inside each row of a packed sequence.

A pack (`packing.Pack`) is one sequence of rows without padding. The model's forward passes
`row_lengths` on to attention, and `shared_prefix`, the number of tokens that all rows share.
transformers gets the function below by the name it is registered under, so no model code changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "jetson_ft_packed"
_BLOCKWISE_DEVICES = ("cpu",)

# Arguments that models pass to every attention function and that change nothing in its result.
_WITHOUT_EFFECT = {
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "use_cache",
}  # fmt: skip


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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each row: [1, tokens, heads, head_dim], and no weights.

    Args:
        query: [1, heads, tokens, head_dim]; key and value may have fewer heads.
        shared_prefix: tokens that all rows begin with; the sequence starts with one copy of them.
        sliding_window: tokens a position may look back, itself included.

    Raises:
        ValueError: an argument would change the result (masks, soft caps, sinks, position biases).
    """
    if row_lengths is None:
        raise ValueError("packed attention was called without row_lengths")
    unknown = [k for k, v in others.items() if v is not None and k not in _WITHOUT_EFFECT]
    if attention_mask is not None or unknown:
        raise ValueError(f"packed attention doesn't compute {unknown or 'attention_mask'}")
    import torch

    from jetson_ft.kernels.attention_cpu import blockwise_attention
    from jetson_ft.kernels.attention_varlen import varlen_attention

    is_windowed = sliding_window is not None and max(row_lengths) > sliding_window
    is_plain = not dropout and not is_windowed
    if is_plain and query.device.type in _BLOCKWISE_DEVICES:
        return blockwise_attention(query, key, value, row_lengths, shared_prefix, scaling), None
    if shared_prefix:
        tensors = (query, key, value)
        query, key, value = (_unshare(each, row_lengths, shared_prefix) for each in tensors)
    out = varlen_attention(query, key, value, row_lengths, scaling) if is_plain else None
    if out is None:
        out = _row_by_row(query, key, value, row_lengths, scaling, dropout, sliding_window)
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
    # `split` and not slices: the gradient of a slice is a whole tensor of zeros around it.
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


@contextmanager
def use_packed_attention(model: Any) -> Iterator[None]:
    """Make `packed_attention` the model's attention within the context."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def supports_packing(model: Any) -> bool:
    """Return whether the second of two packed rows gives the logits that it gives alone."""
    import torch

    embedding = model.get_input_embeddings().weight
    vocabulary, device = len(embedding), embedding.device
    # Two rows of three tokens that share the first; the second row is 0, 3, 4.
    tokens = [vocabulary // 2, vocabulary // 3, 7 % vocabulary, 3, 5]
    ids = torch.tensor([tokens], device=device)
    positions = torch.tensor([[0, 1, 2, 1, 2]], device=device)
    with torch.no_grad():
        alone = model(input_ids=ids[:, [0, 3, 4]], use_cache=False).logits[0, 1:].float()
        try:
            with use_packed_attention(model):
                if model.config._attn_implementation != PACKED_ATTENTION:
                    logger.debug("no packing: the model's own attention can't be replaced")
                    return False
                together = model(
                    input_ids=ids, position_ids=positions, row_lengths=[3, 3], shared_prefix=1,
                    use_cache=False,
                )  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            logger.debug("no packing: the model fails with packed rows: %r", error)
            return False
    difference = (together.logits[0, 3:].float() - alone).abs().max()
    # Measured on SmolLM2: at most 3 % between formats (int8), at least 48 % when rows attend to
    # each other. A NaN isn't equal either.
    is_equal = bool(difference < 0.1 * alone.abs().max())
    if not is_equal:
        logger.debug("no packing: logits differ by %.3g", difference)
    return is_equal
