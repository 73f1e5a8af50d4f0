"""LoRA layers that compute PEFT's formula in fewer passes over memory.

PEFT adds the adapter in three elementwise passes over the output, and at bf16 casts the input to
fp32 and back. Here the matrix multiplication itself adds the product. Adapters are multiplied in
the arithmetic of the base; their fp32 values stay the masters. Only x Aᵀ and the input are kept for
the backward pass, or what the input is quickly recomputed from.

All but plain LoRA (DoRA, dropout, merged or several adapters) goes through PEFT's own `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from torch.nn.functional import linear


def register_layers(config: LoraConfig) -> None:
    """Make PEFT build these layers for `config`, on dense and quantized linear layers."""
    layers: dict[type, type] = {}
    try:
        import bitsandbytes as bnb
        from peft.tuners.lora import bnb as peft_bnb
    except ImportError:  # no bitsandbytes for this machine
        pass
    else:
        layers[bnb.nn.Linear4bit] = _quantized_layer(peft_bnb.Linear4bit)
        layers[bnb.nn.Linear8bitLt] = _quantized_layer(peft_bnb.Linear8bitLt)
    layers[torch.nn.Linear] = FusedLinear  # last, as the quantized ones are subclasses of it
    config._register_custom_module(layers)


def mark_recomputable(function: Callable[..., Tensor], result: Tensor, *args: Tensor) -> Tensor:
    """Return `result`, marked: adapters recompute it in backward from args that are kept anyway."""
    if torch.is_grad_enabled():  # the version counts changes in place
        result._jetson_ft_recompute = result._version, function, args
    return result


def clear_recompute(x: Tensor) -> None:
    """Remove the mark, for a layer that holds x: the mark would hold its args too."""
    vars(x).pop("_jetson_ft_recompute", None)


def _recompute_args(x: Tensor) -> tuple[Any, ...]:
    """Return the function that recomputes x, then its args; for x without a mark, x itself."""
    version, function, args = getattr(x, "_jetson_ft_recompute", (None, None, ()))
    if version is None or version != x._version:
        return (lambda x: x), x.detach()
    return (function, *(arg.detach() for arg in args))


_Adapter = tuple[Tensor, Tensor, float]


def _plain_adapter(layer: Any) -> _Adapter | None:
    """Return (A, B, scaling) of the one active adapter; None for PEFT's own `forward`."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    has_dropout = layer.training and not isinstance(dropout, torch.nn.Identity)
    is_plain = not has_dropout and b.bias is None
    return (a.weight, b.weight, layer.scaling[name]) if is_plain else None


class FusedLinear(LoraLinear):
    """An adapter beside a frozen dense layer."""

    # Layers that the model applies to the same input after this one (`fuse_layers` sets them).
    # One call multiplies for all of them, and sums their gradients of the input in place.
    linked_layers: tuple[FusedLinear, ...] = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        adapter = _plain_adapter(self)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        # Stored products are valid for this version of x and this grad mode.
        version = 0 if x.is_inference() else x._version, torch.is_grad_enabled()
        products: dict[FusedLinear, Tensor]
        products_version, products = vars(x).get("_jetson_ft_products", (None, {}))
        if products_version != version:
            vars(x).pop("_jetson_ft_products", None)  # and with them their graph
        elif self in products:
            return products.pop(self)
        linked = self.linked_layers
        adapters: list[Any] = [adapter, *map(_plain_adapter, linked)]
        if None in adapters:
            linked, adapters = (), [adapter]
        product, *others = _multiply(x, [self, *linked], adapters)
        if others:
            x._jetson_ft_products = version, dict(zip(linked, others, strict=True))
        return product


def _multiply(
    x: Tensor, layers: Sequence[FusedLinear], adapters: Sequence[_Adapter]
) -> tuple[Tensor, ...]:
    """[..., in] to each layer's [..., out]."""
    recompute, *args = _recompute_args(x)
    # Cast in each pass: PyTorch's fused AdamW changes the masters without counting a version.
    cast_a, cast_bs = _cast_adapters(adapters, x.dtype)
    masters = (matrix for a, b, _ in adapters for matrix in (a, b))
    bases = [layer.base_layer for layer in layers]
    biases, weights = [base.bias for base in bases], [base.weight for base in bases]
    scalings = [scaling for *_, scaling in adapters]
    products: tuple[Tensor, ...] = _DenseWithAdapters.apply(
        x, biases, scalings, recompute, cast_a, *cast_bs, *weights, *args, *masters
    )
    return products


def _quantized_layer(peft_layer: type) -> type:
    """Return the subclass of PEFT's layer for a quantized base, which bitsandbytes multiplies."""

    class FusedQuantized(peft_layer):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            adapter = _plain_adapter(self)
            if adapter is None or args or kwargs:
                return super().forward(x, *args, **kwargs)
            return _AddAdapter.apply(self.base_layer(x), x, *adapter, *_recompute_args(x))

    return FusedQuantized


def _cast_adapters(adapters: Sequence[_Adapter], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return all A stacked [ranks, in] and each B transposed [r, out], in `dtype`.

    On CPUs a product with a tall thin matrix is two to three times faster if its long side is
    contiguous.
    """
    cast_as = [a.detach().to(dtype) for a, *_ in adapters]
    cast_bs = [b.detach().to(dtype).t().contiguous() for _, b, _ in adapters]
    return torch.cat(cast_as) if len(cast_as) > 1 else cast_as[0], cast_bs


def _reshape_like(rows: Tensor, like: Tensor) -> Tensor:
    """Return [tokens, out] as [..., out], not a view: OLMo changes it in place."""
    return torch.ops.aten._unsafe_view(rows, [*like.shape[:-1], rows.shape[-1]])


class _DenseWithAdapters(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + biasᵢ + scalingᵢ · (x Aᵢᵀ) Bᵢᵀ for layers that take the same input, Wᵢ and
    biasᵢ frozen (Hu et al. 2021, eq. 3).

    The tensors are all A in the arithmetic's dtype, each Bᵀ, each W, the args that x is recomputed
    from, and the masters A₁, B₁, A₂, …, which get the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        biases: list[Tensor | None],
        scalings: list[float],
        recompute: Callable[..., Tensor],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(scalings)
        a, bs, ws = tensors[0], tensors[1 : count + 1], tensors[count + 1 : 2 * count + 1]
        rows = x.reshape(-1, x.shape[-1])
        x_a = rows @ a.t()
        ctx.save_for_backward(x_a, *tensors[: -2 * count])
        ctx.scalings, ctx.recompute = scalings, recompute
        parts = zip(ws, biases, bs, scalings, x_a.split([len(b) for b in bs], 1), strict=True)
        return tuple(
            _reshape_like(linear(rows, w, bias).addmm_(part, b, alpha=scaling), x)
            for w, bias, b, scaling, part in parts
        )

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor) -> Any:
        count = len(ctx.scalings)
        x_a, a, *rest = ctx.saved_tensors
        bs, ws, args = rest[:count], rest[count : 2 * count], rest[2 * count :]
        x = ctx.recompute(*args)
        rows, ranks = x.reshape(-1, x.shape[-1]), [len(b) for b in bs]
        ds = [d_y.reshape(-1, d_y.shape[-1]) for d_y in d_ys]
        d_x_as, d_bs = [], []
        for d, b, part, scaling in zip(ds, bs, x_a.split(ranks, 1), ctx.scalings, strict=True):
            d_x_as.append((d @ b.t()).mul_(scaling))
            d_bs.append((part.t() @ d).mul_(scaling).t())
        d_x_a = torch.cat(d_x_as, 1)
        d_as = (d_x_a.t() @ rows).split(ranks)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = ds[0] @ ws[0]
            for d, w in zip(ds[1:], ws[1:], strict=True):
                d_x.addmm_(d, w)
            d_x = d_x.addmm_(d_x_a, a).view_as(x)
        masters = (each for pair in zip(d_as, d_bs, strict=True) for each in pair)
        return d_x, *[None] * (4 + len(rest)), *masters


class _AddAdapter(torch.autograd.Function):
    """y = base + scaling · (x Aᵀ) Bᵀ, for a base product that bitsandbytes computed."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor,
        scaling: float, recompute: Callable[..., Tensor], *args: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        cast_a, (cast_b,) = _cast_adapters([(a, b, scaling)], x.dtype)
        x_a = rows @ cast_a.t()
        flat = base.reshape(-1, base.shape[-1])
        y = torch.addmm(flat, x_a.to(base.dtype), cast_b.to(base.dtype), alpha=scaling)
        ctx.save_for_backward(a, b, x_a, *args)
        ctx.scaling, ctx.recompute = scaling, recompute
        return _reshape_like(y, base)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        a, b, x_a, *args = ctx.saved_tensors
        x = ctx.recompute(*args)
        rows = x.reshape(-1, x.shape[-1])
        d_rows = d_y.reshape(-1, d_y.shape[-1]).to(x.dtype)
        cast_a, (cast_b,) = _cast_adapters([(a, b, ctx.scaling)], x.dtype)
        d_x_a = (d_rows @ cast_b.t()).mul_(ctx.scaling)
        d_a = d_x_a.t() @ rows
        d_b = (x_a.t() @ d_rows).mul_(ctx.scaling).t()
        d_x = (d_x_a @ cast_a).view_as(x) if ctx.needs_input_grad[1] else None
        # None for the scaling, the function that recomputes x, and its args.
        return d_y, d_x, d_a, d_b, *[None] * (2 + len(args))
