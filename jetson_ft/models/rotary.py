"""Attention's projections with rotary position embeddings in fewer passes over memory.

Written in eager PyTorch, a rotation slices, negates, joins, multiplies twice and adds, for query
and key, and does all of it again backwards; where only a part of each head is rotated (Phi) whole
tensors of zeros are made for the gradients of the slices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Their attention is projections, rotation, attention and a projection, and nothing more.
_KNOWN = {"LlamaAttention", "MistralAttention", "PhiAttention", "Qwen2Attention"}


class _Rotated(torch.autograd.Function):
    """The first R of each head's D numbers rotated by pairs (i, i + R/2), the rest as they are.

    Su et al. 2021, "RoFormer", section 3.2, with the pairs that GPT-NeoX introduced.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # On a CPU attention takes heads one behind the other, on a GPU tokens.
        out = x.new_empty(x.shape) if x.device.type == "cpu" else torch.empty_like(x)
        return _rotate(x, cos, sin, out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        rows, heads, tokens, width = d_out.shape
        by_token = d_out.new_empty(rows, tokens, heads, width).transpose(1, 2)
        return _rotate(d_out, cos, -sin, by_token), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Writes to `out` x rotated: [rows, heads, tokens, D]; cos and sin [rows, 1, tokens, R/2]."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def is_known(module: Any) -> bool:
    """Whether `attention` may be tried in its place."""
    return type(module).__name__ in _KNOWN and not getattr(module, "qk_layernorm", False)


def attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the module's own `forward` gives; where there is a cache, by that itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation)
    if past_key_values is not None or attend is None:
        own: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **options
        )
        return own
    shape = hidden_states.shape[:-1]
    query, key, value = (
        project(hidden_states).view(*shape, -1, module.head_dim).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    cos, sin = (half.chunk(2, -1)[0].unsqueeze(1) for half in position_embeddings)
    query, key = _Rotated.apply(query, cos, sin), _Rotated.apply(key, cos, sin)
    dropout = module.attention_dropout if module.training else 0.0
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    out, weights = attend(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=module.scaling, sliding_window=window, **options,
    )  # fmt: skip
    project = module.dense if hasattr(module, "dense") else module.o_proj
    return project(out.reshape(*shape, -1)), weights


def example(module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of two tokens, [1, 2, R], for a trial."""
    width = getattr(module, "rotary_ndims", module.head_dim)
    angles = torch.linspace(0.1, 2.0, width, device=like.device).view(1, 2, width // 2)
    both = torch.cat((angles, angles), -1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)
