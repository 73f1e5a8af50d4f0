"""LoRA layers that compute PEFT's formula in fewer passes over memory.

PEFT adds the adapter as `result + lora_B(lora_A(x)) * scaling`: three elementwise passes over
the output, and at bf16 a cast of the input to fp32 and back. Here the product is added by the
matrix multiplication itself, adapters are multiplied in the arithmetic of the base (their fp32
values stay the masters), and only the input and the small product are kept for the backward
pass; of an input that is quickly made again, only what it is made of. The layers come in
through PEFT's own register of custom modules, so that the adapter is an ordinary one. What is
not plain LoRA (DoRA, dropout, merged or several adapters) takes PEFT's way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import layer
from torch import Tensor
from torch.nn.functional import linear


def register(config: LoraConfig) -> None:
    """Makes PEFT build these layers for `config`, on whatever the base's linear layers are."""
    config._register_custom_module({**_quantised_layers(), torch.nn.Linear: FusedLinear})


class _Made(NamedTuple):
    by: Callable[..., Tensor]
    of: tuple[Tensor, ...]
    version: int  # of the result, which counts changes in place


def make(by: Callable[..., Tensor], result: Tensor, *of: Tensor) -> Tensor:
    """`result`, which adapters needn't keep: `by(*of)` makes it again, in a pass over memory.

    What it is made `of` should be kept for the backward pass anyway.
    """
    if torch.is_grad_enabled():
        result._jetson_ft_made = _Made(by, of, result._version)
    return result


def forget(x: Tensor) -> None:
    """Leaves out how `x` was made, before a layer that holds it: what it is made of goes then."""
    vars(x).pop("_jetson_ft_made", None)


def _as_is(x: Tensor) -> Tensor:
    return x


def _kept(x: Tensor) -> tuple[Any, ...]:
    """For the functions below: what makes their input again, and of which tensors."""
    made: _Made | None = getattr(x, "_jetson_ft_made", None)
    if made is None or made.version != x._version:
        return _as_is, x.detach()
    return (made.by, *(part.detach() for part in made.of))


class _Fused:
    """What the layers below share: when the short way may be taken, and its operands."""

    def _plain_adapter(self: Any) -> tuple[Tensor, Tensor, float] | None:
        """(A, B, scaling) of the one active adapter; None where PEFT's own way is needed."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant:
            return None
        if self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity):
            return None
        a, b = self.lora_A[name], self.lora_B[name]
        return None if b.bias is not None else (a.weight, b.weight, self.scaling[name])


class FusedLinear(_Fused, layer.Linear):
    """An adapter beside a frozen dense layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        return _DenseWithAdapter.apply(x, base.weight, base.bias, *adapter, *_kept(x))


def _quantised_layers() -> dict[type, type]:
    try:
        import bitsandbytes as bnb
        from peft.tuners.lora import bnb as peft_bnb
    except ImportError:  # no bitsandbytes for this machine
        return {}
    return {
        bnb.nn.Linear4bit: _beside_quantised(peft_bnb.Linear4bit),
        bnb.nn.Linear8bitLt: _beside_quantised(peft_bnb.Linear8bitLt),
    }


def _beside_quantised(peft_layer: type) -> type:
    """The subclass of PEFT's layer for a quantised base; bitsandbytes multiplies the base."""

    class FusedQuantised(_Fused, peft_layer):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            adapter = self._plain_adapter()
            if adapter is None or args or kwargs:
                return super().forward(x, *args, **kwargs)
            return _AddAdapter.apply(self.base_layer(x), x, *adapter, *_kept(x))

    return FusedQuantised


def _small(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [r, in] and B's transpose [r, out], both contiguous, in the arithmetic's dtype.

    A product with a tall thin matrix runs two to three times faster on CPUs when its long side
    is contiguous.
    """
    return a.to(dtype), b.to(dtype).t().contiguous()


def _adapter_gradients(
    d_y: Tensor, x: Tensor, low: Tensor, b_t: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A and B, and that of the low-rank product [tokens, r], scaled."""
    d_low = (d_y @ b_t.t()).mul_(scaling)
    d_a = (d_low.t() @ x).float()
    d_b = (low.t() @ d_y).mul_(scaling).t().float()
    return d_a, d_b, d_low


def _no_gradients(parts: list[Tensor]) -> list[None]:
    """Of the scaling, of what makes the input again, and of what it is made of."""
    return [None, None, *(None for _ in parts)]


class _DenseWithAdapter(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ, W and bias frozen (Hu et al. 2021, eq. 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
        scaling: float, again: Callable[..., Tensor], *parts: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        a_now, b_t = _small(a, b, x.dtype)
        low = rows @ a_now.t()
        y = linear(rows, w, bias).addmm_(low, b_t, alpha=scaling)
        ctx.save_for_backward(w, a, b, low, *parts)
        ctx.scaling, ctx.again = scaling, again
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        w, a, b, low, *parts = ctx.saved_tensors
        x = ctx.again(*parts)
        rows, d_rows = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
        a_now, b_t = _small(a, b, x.dtype)
        d_a, d_b, d_low = _adapter_gradients(d_rows, rows, low, b_t, ctx.scaling)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (d_rows @ w).addmm_(d_low, a_now).view_as(x)
        return d_x, None, None, d_a, d_b, *_no_gradients(parts)


class _AddAdapter(torch.autograd.Function):
    """y = base + scaling · (x Aᵀ) Bᵀ, for a base that something else has multiplied."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor,
        scaling: float, again: Callable[..., Tensor], *parts: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        a_now, b_t = _small(a, b, x.dtype)
        low = rows @ a_now.t()
        flat = base.reshape(-1, base.shape[-1])
        y = torch.addmm(flat, low.to(base.dtype), b_t.to(base.dtype), alpha=scaling)
        ctx.save_for_backward(a, b, low, *parts)
        ctx.scaling, ctx.again = scaling, again
        return y.view_as(base)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        a, b, low, *parts = ctx.saved_tensors
        x = ctx.again(*parts)
        rows = x.reshape(-1, x.shape[-1])
        d_rows = d_y.reshape(-1, d_y.shape[-1]).to(x.dtype)
        a_now, b_t = _small(a, b, x.dtype)
        d_a, d_b, d_low = _adapter_gradients(d_rows, rows, low, b_t, ctx.scaling)
        d_x = (d_low @ a_now).view_as(x) if ctx.needs_input_grad[1] else None
        return d_y, d_x, d_a, d_b, *_no_gradients(parts)
