"""Attention that stays inside each row of a packed sequence.

Rows of different length lie one behind the other in one sequence without padding; their
bounds travel through the model's forward as `row_lengths`, with the number of tokens that they
share as `opening`. transformers finds the function below by the name it is registered under, so
no model code is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "jetson_ft_packed"

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
    opening: int = 0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention row by row.

    Raises `ValueError` for a mask, and for any other argument that would change the result (soft
    caps, sinks, position biases): such a model can't be packed.

    Args:
        query: [1, heads, tokens, head_dim]; key and value may have fewer heads.
        row_lengths: tokens of each row.
        opening: tokens that all rows begin with, of which the sequence has one copy, in front.
        sliding_window: tokens a position may look back, itself included.

    Returns:
        [1, tokens, heads, head_dim] and no weights.
    """
    if row_lengths is None:
        raise ValueError("packed attention was called without row bounds")
    unknown = [k for k, v in others.items() if v is not None and k not in _WITHOUT_EFFECT]
    if attention_mask is not None or unknown:
        raise ValueError(f"packed attention doesn't compute {unknown or 'attention_mask'}")
    from jetson_ft.models import cpu_attention, varlen

    plain = not dropout and not _is_windowed(max(row_lengths), sliding_window)
    if plain and _takes_blocks(query):
        return cpu_attention.attend(query, key, value, row_lengths, opening, scaling), None
    if opening:
        query, key, value = (_laid_out(each, row_lengths, opening) for each in (query, key, value))
    out = varlen.attend(query, key, value, row_lengths, scaling) if plain else None
    if out is None:
        out = _row_by_row(query, key, value, row_lengths, scaling, dropout, sliding_window)
    return _folded(out, row_lengths, opening) if opening else out, None


def _takes_blocks(query: torch.Tensor) -> bool:
    return bool(query.device.type == "cpu")


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    row_lengths: list[int], scaling: float | None, dropout: float, sliding_window: int | None,
) -> torch.Tensor:  # fmt: skip
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def one_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window(q.shape[2], sliding_window, q.device),
            dropout_p=dropout,
            is_causal=not _is_windowed(q.shape[2], sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    # `split` and not slices: the gradient of a slice is a whole tensor of zeros around it.
    rows = zip(*(tensor.split(row_lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([one_row(*row) for row in rows], 2).transpose(1, 2).contiguous()


def _laid_out(tensor: torch.Tensor, row_lengths: list[int], opening: int) -> torch.Tensor:
    """Each row whole, one behind the other: [1, heads, tokens of the rows, head_dim].

    Attention alone needs them so, and is the small part of a layer; all else is computed once.
    """
    import torch

    first, *own = tensor.split([opening, *(length - opening for length in row_lengths)], 2)
    return torch.cat([part for rest in own for part in (first, rest)], 2)


def _folded(out: torch.Tensor, row_lengths: list[int], opening: int) -> torch.Tensor:
    """The other way round, [1, tokens, heads, head_dim]: of the openings the first row's."""
    import torch

    sizes = [size for length in row_lengths for size in (opening, length - opening)]
    parts = out.split(sizes, 1)
    return torch.cat([parts[0], *parts[1::2]], 1)


def _is_windowed(length: int, sliding_window: int | None) -> bool:
    return sliding_window is not None and length > sliding_window


def _window(length: int, sliding_window: int | None, device: Any) -> torch.Tensor | None:
    import torch

    if not _is_windowed(length, sliding_window):
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Within it, the model's attention is `packed_attention`."""
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def supports_packing(model: Any) -> bool:
    """Whether rows of a pack really keep to themselves in this architecture: tried, not assumed.

    The second of two packed rows that begin alike must give the logits that it gives alone.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    first = [vocabulary // 2, vocabulary // 3, 7 % vocabulary]
    second = [vocabulary // 2, 3, 5]
    ids = torch.tensor([first + second[1:]], device=device)
    positions = torch.tensor([[0, 1, 2, 1, 2]], device=device)
    with torch.no_grad():
        whole = torch.tensor([second], device=device)
        alone = model(input_ids=whole, use_cache=False).logits[0, 1:].float()
        try:
            with packed(model):
                if model.config._attn_implementation != NAME:
                    return False  # attention of its own, which no other can replace
                together = model(
                    input_ids=ids, position_ids=positions, row_lengths=[3, 3], opening=1,
                    use_cache=False,
                )  # fmt: skip
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
    difference = (together.logits[0, 3:].float() - alone).abs().max()
    # Measured on SmolLM2: 3 % at most between formats (int8), 48 % at least when rows leak.
    return bool(difference < 0.1 * alone.abs().max())
