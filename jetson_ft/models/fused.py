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
from torch.nn.functional import gelu, silu

from jetson_ft.models.lora import Made, apply_to_made


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
    return counts


def _gives_the_same(module: Any, faster: Callable[[Any, Tensor], Tensor]) -> bool:
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
    try:
        with torch.no_grad():
            theirs, ours = module.forward(x), faster(module, x)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    tolerance = 2 * torch.finfo(dtype).eps * float(theirs.abs().max())
    return bool((theirs - ours).abs().max() <= max(tolerance, 2e-6))


# --- RMSNorm (Zhang and Sennrich 2019) -------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """y = weight · x / sqrt(mean(x²) + eps), keeping x and one number a row; weight frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        d_normed, wide = (d_y * weight).to(inverse.dtype), x.to(inverse.dtype)
        along = torch.linalg.vecdot(d_normed, wide)[..., None]
        along = along.mul_(inverse.pow(3)).div_(-x.shape[-1])
        return d_normed.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


def _is_rms_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    out: Tensor = _RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)
    return out


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
    made = Made(_swiglu, (gate, up))
    return apply_to_made(module.down_proj, _SwiGLU.apply(gate, up), made)


# --- GELU as GPT-2 writes it -----------------------------------------------------------------


def _is_gelu_new(module: Any) -> bool:
    return type(module).__name__ == "NewGELUActivation"


def _gelu_new(module: Any, hidden_states: Tensor) -> Tensor:
    return _gelu_tanh(hidden_states)


def _gelu_tanh(x: Tensor) -> Tensor:
    """The same formula (Hendrycks and Gimpel 2016, tanh form) as one operation."""
    return gelu(x, approximate="tanh")


def _is_mlp_with_gelu(module: Any) -> bool:
    return (
        hasattr(module, "fc1")
        and hasattr(module, "fc2")
        and _is_gelu_new(getattr(module, "activation_fn", None))
    )


def _mlp_with_gelu(module: Any, hidden_states: Tensor) -> Tensor:
    """Keeps the wide tensor before GELU alone, for which `gelu_new` has to be exchanged first."""
    wide = module.fc1(hidden_states)
    return apply_to_made(module.fc2, _gelu_tanh(wide), Made(_gelu_tanh, (wide,)))


_KNOWN: tuple[tuple[str, Callable[[Any], bool], Callable[[Any, Tensor], Tensor]], ...] = (
    ("rms_norm", _is_rms_norm, _rms_norm),
    ("swiglu", _is_gated_silu, _gated_silu),
    ("gelu_tanh", _is_gelu_new, _gelu_new),
    ("gelu_mlp", _is_mlp_with_gelu, _mlp_with_gelu),
)
