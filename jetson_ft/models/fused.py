"""The same arithmetic as a model's own layers in fewer passes over memory, saving less.

Written in eager PyTorch, a norm or an activation is a chain of elementwise operations, each of
which reads and writes the whole tensor and most of which keep a copy for the backward pass.
The functions below keep only what backward can't do without. A module is exchanged only where
a trial shows that its result stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from jetson_ft.models import rotary
from jetson_ft.models.lora import FusedLinear, forget, make


def fuse(model: torch.nn.Module) -> dict[str, int]:
    """Exchanges what it knows in the model, in place.

    Returns:
        How many modules of each kind were exchanged.
    """
    counts: dict[str, int] = {}
    for kind, fits, faster in _KNOWN:
        for module in model.modules():
            if fits(module) and _gives_the_same(module, faster):
                module.forward = faster.__get__(module)
                counts[kind] = counts.get(kind, 0) + 1
    for module in model.modules():
        _introduce(module)
        if type(module).__name__ == "Linear8bitLt":  # bitsandbytes'
            module.register_forward_pre_hook(lambda _, inputs: forget(*inputs))
    return counts


def _introduce(module: Any) -> None:
    """Makes siblings of the adapted layers that `module` applies to the same input, in order.

    By name and width. Whoever is asked with another input after all is multiplied by itself.
    """
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        named = [getattr(module, name, None) for name in names]
        layers = [layer for layer in named if isinstance(layer, FusedLinear)]
        if len({layer.in_features for layer in layers}) == 1:
            layers[0].siblings = tuple(layers[1:])


def _gives_the_same(module: Any, faster: Callable[..., Any]) -> bool:
    """Tries both on a few numbers; adapters and quantised layers inside are part of the trial."""
    parameter = next(module.parameters(), None)
    width = getattr(getattr(module, "config", module), "hidden_size", None) or (
        parameter.shape[-1] if parameter is not None and parameter.ndim == 1 else 64
    )
    dtype = parameter.dtype if parameter is not None else torch.float32
    if not dtype.is_floating_point:
        dtype = torch.float32
    device = parameter.device if parameter is not None else "cpu"
    x = torch.linspace(-3, 3, 2 * width, dtype=dtype, device=device).view(1, 2, width)
    more = (rotary.example(module, x), None) if rotary.is_known(module) else ()
    try:
        with torch.no_grad():
            theirs, ours = _first(module.forward(x, *more)), _first(faster(module, x, *more))
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    # A rotation's rounding goes through attention's exponentials: on a real model 4 units of bf16
    # and 18 of fp32, where wrong rotations differ by a third of the largest number and more.
    eps = torch.finfo(dtype).eps
    share = max(8 * eps, 1e-4) if more else 2 * eps
    return bool((theirs - ours).abs().max() <= max(share * float(theirs.abs().max()), 2e-6))


def _first(found: Any) -> Tensor:
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


# --- RMSNorm (Zhang and Sennrich 2019), LayerNorm (Ba et al. 2016) ---------------------------


def _scaled(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).to(x.dtype).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """y = weight · x / sqrt(mean(x²) + eps), keeping x and one number a row; weight frozen.

    Gives those numbers too, [..., 1].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return _scaled(x, inverse, weight), inverse

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, _: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        d_normed, wide = (d_y * weight).to(inverse.dtype), x.to(inverse.dtype)
        along = torch.linalg.vecdot(d_normed, wide)[..., None]
        along = along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return d_normed.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


def _is_rms_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    x, weight = hidden_states, module.weight
    out, inverse = _RMSNorm.apply(x, weight, module.variance_epsilon)
    return make(_scaled, out, x, inverse, weight)


def _is_layer_norm(module: Any) -> bool:
    return type(module) is torch.nn.LayerNorm


def _layer_norm(module: Any, x: Tensor) -> Tensor:
    def by(x: Tensor) -> Tensor:
        return layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)

    return make(by, by(x), x)


# --- gated MLP (SwiGLU: Shazeer 2020) --------------------------------------------------------


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, keeping the two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(d_y * up, gate)
        return d_gate, silu(gate).mul_(d_y)


def _is_gated_silu(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return (
        all(hasattr(module, part) for part in parts)
        and "silu" in type(module.act_fn).__name__.lower()
    )


def _gated_silu(module: Any, hidden_states: Tensor) -> Tensor:
    gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
    out: Tensor = module.down_proj(make(_swiglu, _SwiGLU.apply(gate, up), gate, up))
    return out


# --- GELU as GPT-2 writes it -----------------------------------------------------------------


def _is_gelu_new(module: Any) -> bool:
    return type(module).__name__ == "NewGELUActivation"


def _gelu_new(module: Any, x: Tensor) -> Tensor:
    return make(_gelu_tanh, _gelu_tanh(x), x)


def _gelu_tanh(x: Tensor) -> Tensor:
    """The same formula (Hendrycks and Gimpel 2016, tanh form) as one operation."""
    return gelu(x, approximate="tanh")


_KNOWN: tuple[tuple[str, Callable[[Any], bool], Callable[..., Any]], ...] = (
    ("rms_norm", _is_rms_norm, _rms_norm),
    ("layer_norm", _is_layer_norm, _layer_norm),
    ("swiglu", _is_gated_silu, _gated_silu),
    ("gelu_tanh", _is_gelu_new, _gelu_new),
    ("rotary", rotary.is_known, rotary.attention),
)
