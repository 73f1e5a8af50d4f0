"""LoRA layers that compute PEFT's formula in fewer passes over memory.

PEFT adds the adapter as `result + lora_B(lora_A(x)) * scaling`: three elementwise passes over
the output, and at bf16 a cast of the input to fp32 and back. Here the product is added by the
matrix multiplication itself, adapters are multiplied in the arithmetic of the base (their fp32
values stay the masters), and only the input and the small product are kept for the backward
pass; of an input that is quickly made again, only what it is made of. Layers that take the same
input are multiplied together. The layers come in
through PEFT's own register of custom modules, so that the adapter is an ordinary one. What is
not plain LoRA (DoRA, dropout, merged or several adapters) takes PEFT's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    # Layers that the model applies to the same input after this one (`fused.fuse` finds them).
    # One call multiplies for all of them, and sums their gradients of the input in place.
    siblings: tuple[FusedLinear, ...] = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        own = self._plain_adapter()
        if own is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        ready = _ready(x).pop(self, None)
        if ready is not None:
            return ready
        others = [other for one in self.siblings if (other := one._plain_adapter())]
        if len(others) < len(self.siblings):
            return _multiplied(x, [self], [own])[0]
        found, *theirs = _multiplied(x, [self, *self.siblings], [own, *others])
        if theirs:
            x._jetson_ft_ready = (_state(x), dict(zip(self.siblings, theirs, strict=True)))
        return found


_Adapter = tuple[Tensor, Tensor, float]


def _ready(x: Tensor) -> dict[FusedLinear, Tensor]:
    """What waits on `x` for its later layers, unless it has changed since."""
    products: dict[FusedLinear, Tensor]
    state, products = vars(x).get("_jetson_ft_ready", (None, {}))
    if state == _state(x):
        return products
    vars(x).pop("_jetson_ft_ready", None)  # and with them their graph
    return {}


def _state(x: Tensor) -> tuple[int, bool]:
    """What its products depend on: how often it changed in place, and whether a graph is made."""
    return 0 if x.is_inference() else x._version, torch.is_grad_enabled()


def _multiplied(
    x: Tensor, layers: Sequence[FusedLinear], adapters: Sequence[_Adapter]
) -> tuple[Tensor, ...]:
    """[..., in] to each layer's [..., out]."""
    again, *parts = _kept(x)
    # Anew in each pass: PyTorch's fused AdamW changes the masters without counting a version.
    small_a, smalls_b = _small(adapters, x.dtype)
    frozen = _Frozen(
        tuple(one.base_layer.bias for one in layers),
        tuple(scaling for *_, scaling in adapters),
        again,
        len(parts),
    )
    masters = (matrix for a, b, _ in adapters for matrix in (a, b))
    weights = (one.base_layer.weight for one in layers)
    found: tuple[Tensor, ...] = _DenseWithAdapters.apply(
        x, frozen, small_a, *smalls_b, *weights, *parts, *masters
    )
    return found


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


def _small(adapters: Sequence[_Adapter], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A below one another [ranks, in] and each B's transpose [r, out], in the arithmetic's
    dtype.

    A product with a tall thin matrix runs two to three times faster on CPUs when its long side
    is contiguous.
    """
    every = [a.detach().to(dtype) for a, *_ in adapters]
    return torch.cat(every) if len(every) > 1 else every[0], [
        b.detach().to(dtype).t().contiguous() for _, b, _ in adapters
    ]


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """[tokens, out] in the shape of `like` but for the width.

    Not a view to autograd, which forbids a model to change those in place (OLMo clamps queries).
    """
    shape = [*like.shape[:-1], rows.shape[-1]]
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, shape)
    return shaped


class _Frozen(NamedTuple):
    """What `_DenseWithAdapters` needs besides its tensors."""

    biases: tuple[Tensor | None, ...]
    scalings: tuple[float, ...]
    again: Callable[..., Tensor]
    parts: int  # how many tensors the input is made again of


class _DenseWithAdapters(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + biasᵢ + scalingᵢ · (x Aᵢᵀ) Bᵢᵀ for layers that take the same input, Wᵢ and
    biasᵢ frozen (Hu et al. 2021, eq. 3).

    After `frozen` come all A in the arithmetic's dtype, each Bᵀ, each W, what x is made again of,
    and the masters A₁, B₁, A₂, …, which get the gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: _Frozen, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(frozen.scalings)
        a, bs, ws = tensors[0], tensors[1 : count + 1], tensors[count + 1 : 2 * count + 1]
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.t()
        ctx.save_for_backward(low, *tensors[: 2 * count + 1 + frozen.parts])
        ctx.frozen = frozen
        lows = low.split([len(b) for b in bs], 1)
        return tuple(
            _shaped(linear(rows, w, bias).addmm_(part, b, alpha=scaling), x)
            for w, bias, b, scaling, part in zip(
                ws, frozen.biases, bs, frozen.scalings, lows, strict=True
            )
        )

    @staticmethod
    def backward(ctx: Any, *d_ys: Tensor) -> Any:
        frozen: _Frozen = ctx.frozen
        count = len(frozen.scalings)
        low, a, *rest = ctx.saved_tensors
        bs, ws, parts = rest[:count], rest[count : 2 * count], rest[2 * count :]
        x = frozen.again(*parts)
        rows, ranks = x.reshape(-1, x.shape[-1]), [len(b) for b in bs]
        ds = [d_y.reshape(-1, d_y.shape[-1]) for d_y in d_ys]
        d_lows, d_bs = [], []
        for d, b, part, scaling in zip(ds, bs, low.split(ranks, 1), frozen.scalings, strict=True):
            d_lows.append((d @ b.t()).mul_(scaling))
            d_bs.append((part.t() @ d).mul_(scaling).t())
        d_low = torch.cat(d_lows, 1)
        d_as = (d_low.t() @ rows).split(ranks)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = ds[0] @ ws[0]
            for d, w in zip(ds[1:], ws[1:], strict=True):
                d_x.addmm_(d, w)
            d_x = d_x.addmm_(d_low, a).view_as(x)
        masters = (each for pair in zip(d_as, d_bs, strict=True) for each in pair)
        return d_x, None, None, *(None for _ in rest), *masters


class _AddAdapter(torch.autograd.Function):
    """y = base + scaling · (x Aᵀ) Bᵀ, for a base that something else has multiplied."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor,
        scaling: float, again: Callable[..., Tensor], *parts: Tensor,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        a_now, (b_t,) = _small([(a, b, scaling)], x.dtype)
        low = rows @ a_now.t()
        flat = base.reshape(-1, base.shape[-1])
        y = torch.addmm(flat, low.to(base.dtype), b_t.to(base.dtype), alpha=scaling)
        ctx.save_for_backward(a, b, low, *parts)
        ctx.scaling, ctx.again = scaling, again
        return _shaped(y, base)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        a, b, low, *parts = ctx.saved_tensors
        x = ctx.again(*parts)
        rows = x.reshape(-1, x.shape[-1])
        d_rows = d_y.reshape(-1, d_y.shape[-1]).to(x.dtype)
        a_now, (b_t,) = _small([(a, b, ctx.scaling)], x.dtype)
        d_low = (d_rows @ b_t.t()).mul_(ctx.scaling)
        d_a = d_low.t() @ rows
        d_b = (low.t() @ d_rows).mul_(ctx.scaling).t()
        d_x = (d_low @ a_now).view_as(x) if ctx.needs_input_grad[1] else None
        # None for the scaling, what makes the input again, and what it is made of.
        return d_y, d_x, d_a, d_b, None, None, *(None for _ in parts)
