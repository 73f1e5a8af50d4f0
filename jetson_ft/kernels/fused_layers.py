"""Norms, activations, MLPs and attention in fewer passes over memory, with less kept for backward.

In eager PyTorch each of a chain of elementwise operations reads and writes the whole tensor, and
most keep a copy. `families` lists which module each function below replaces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from torch.nn.functional import layer_norm as torch_layer_norm

from jetson_ft.kernels.families import FAMILIES, LINKED_LAYERS, LayerFamily
from jetson_ft.kernels.lora_linear import FusedLinear, clear_recompute, mark_recomputable
from jetson_ft.models.dims import describe_module

logger = logging.getLogger(__name__)


def fuse_layers(model: torch.nn.Module) -> dict[str, int]:
    """Replace each module's `forward` by its first match in `families.FAMILIES`, after a trial.

    Link adapted layers that take the same input (`FusedLinear.linked_layers`). Return how many
    modules of each family were replaced, in the order of the table.
    """
    families = [family for family in FAMILIES if family.replacement]
    counts = dict.fromkeys((family.name for family in families), 0)
    for module in model.modules():
        kind = describe_module(module)
        family = next((family for family in families if family.matches(kind)), None)
        if family is None:
            continue
        forward = globals()[family.replacement]
        if _is_equal(module, family, forward):
            module.forward = forward.__get__(module)
            counts[family.name] += 1
    for module in model.modules():
        for names in LINKED_LAYERS:
            children = [getattr(module, name, None) for name in names]
            layers = [layer for layer in children if isinstance(layer, FusedLinear)]
            if len({layer.in_features for layer in layers}) == 1:
                layers[0].linked_layers = tuple(layers[1:])
        if type(module).__name__ == "Linear8bitLt":  # bitsandbytes'
            module.register_forward_pre_hook(lambda _, inputs: clear_recompute(*inputs))
    return {name: count for name, count in counts.items() if count}


def _is_equal(module: Any, family: LayerFamily, forward: Callable[..., Any]) -> bool:
    """Try both forward functions on a few numbers; an error but of memory counts as unequal."""
    parameter = next(module.parameters(), torch.empty(64))
    width = getattr(getattr(module, "config", module), "hidden_size", None)
    width = width or (parameter.shape[-1] if parameter.ndim == 1 else 64)
    dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
    x = torch.linspace(-3, 3, 2 * width, dtype=dtype, device=parameter.device).view(1, 2, width)
    is_rotary = family.role == "attention"
    arguments = (_example_position_embeddings(module, x), None) if is_rotary else ()
    try:
        with torch.no_grad():
            results = module.forward(x, *arguments), forward(module, x, *arguments)
        expected, actual = (r[0] if isinstance(r, tuple) else r for r in results)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        logger.debug("%s is not replaced: %r", type(module).__name__, error)
        return False
    # A rotation's rounding goes through attention's exponentials: on a real model 4 units of bf16
    # and 18 of fp32, where wrong rotations differ by a third of the largest number and more.
    eps = torch.finfo(dtype).eps
    share = max(8 * eps, 1e-4) if is_rotary else 2 * eps
    limit = max(share * float(expected.abs().max()), 2e-6)
    return bool((expected - actual).abs().max() <= limit)


# --- RMSNorm (Zhang and Sennrich 2019), LayerNorm (Ba et al. 2016) ---------------------------


def _scale(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).to(x.dtype).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """y = weight · x / sqrt(mean(x²) + eps), weight frozen.

    Keeps x and one number per row, 1 / sqrt(mean(x²) + eps); returns these numbers too, [..., 1].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scale(x, inverse, weight), inverse

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, _: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        d_normed, wide = (d_y * weight).to(inverse.dtype), x.to(inverse.dtype)
        along = torch.linalg.vecdot(d_normed, wide)[..., None]
        along = along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return d_normed.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


def rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    x, weight = hidden_states, module.weight
    out, inverse = _RMSNorm.apply(x, weight, module.variance_epsilon)
    return mark_recomputable(_scale, out, x, inverse, weight)


def layer_norm(module: Any, x: Tensor) -> Tensor:
    def normalize(x: Tensor) -> Tensor:
        return torch_layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)

    return mark_recomputable(normalize, normalize(x), x)


# --- gated MLP (SwiGLU: Shazeer 2020) --------------------------------------------------------


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(d_y * up, gate)
        return d_gate, silu(gate).mul_(d_y)


def swiglu_mlp(module: Any, hidden_states: Tensor) -> Tensor:
    gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    return module.down_proj(mark_recomputable(_swiglu, _SwiGLU.apply(gate, up), gate, up))


# --- GELU as GPT-2 writes it (Hendrycks and Gimpel 2016, tanh form) --------------------------


def gelu_new(module: Any, x: Tensor) -> Tensor:
    gelu_tanh = partial(gelu, approximate="tanh")
    return mark_recomputable(gelu_tanh, gelu_tanh(x), x)


# --- attention's projections with rotary position embeddings ----------------------------------
# In eager PyTorch these took about a sixth of the GPU time: a rotation slices, negates, joins,
# multiplies twice and adds, and where only a part of each head is rotated (Phi) whole tensors of
# zeros are made for the gradients of the slices.


class _Rotated(torch.autograd.Function):
    """Rotate the first R of each head's D numbers by pairs (i, i + R/2); copy the rest.

    Su et al. 2021, "RoFormer", section 3.2, with the pairs that GPT-NeoX introduced.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # The layout that attention takes: by head on a CPU, by token on a GPU.
        out = x.new_empty(x.shape) if x.device.type == "cpu" else torch.empty_like(x)
        return _rotate(x, cos, sin, out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        rows, heads, tokens, width = d_out.shape
        by_token = d_out.new_empty(rows, tokens, heads, width).transpose(1, 2)
        return _rotate(d_out, cos, -sin, by_token), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write x [rows, heads, tokens, D] rotated to `out`; cos and sin are [rows, 1, tokens, R/2]."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotary_attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute what the module's own `forward` does; call it where there is a KV cache."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation)
    if past_key_values is not None or attend is None:
        result: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **options
        )
        return result
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


def _example_position_embeddings(module: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of two tokens, [1, 2, R]."""
    width = getattr(module, "rotary_ndims", module.head_dim)
    angles = torch.linspace(0.1, 2.0, width, device=like.device).view(1, 2, width // 2)
    both = torch.cat((angles, angles), -1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)
