"""Dropout whose mask belongs to the rows, not to the order in which they are computed.

A mask that is drawn from a stream of random numbers depends on the micro-batches, on what is
recomputed and on the number of processes. Here the mask is a function of the seed, the step, the
layer, the row's tokens up to the present one, and the feature (a counter-based generator: Salmon
et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). So rows that share a prefix have the
same mask there, the backward pass draws it again instead of keeping it, and another plan gives the
same result. The exception are layers that get a part of the tokens, such as experts: their mask is
a function of the micro-batch's first token and the place among the tokens that the layer gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jetson_ft.kernels.packing import Pack

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: spreads counters over all 64 bits
# Elements of a mask drawn at one time: what a core's cache holds, or few calls of kernels.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 24}
_LEVELS = 1 << 16  # of the random numbers: the probability is a multiple of 1 / _LEVELS
_KEYS = "_jetson_ft_dropout_keys"


class DropoutKeys:
    """The keys of the pack that is computed at present, [T] int64; None: between packs."""

    current: Tensor | None = None


class RowDropout(torch.nn.Module):
    """Set each feature of each token to 0 with probability p, scale the others; in training only.

    Needs the keys of the pack (`use_dropout_keys`) in the forward and in the backward pass.
    """

    def __init__(self, p: float, number: int, keys: DropoutKeys) -> None:
        """`number` distinguishes the layers of a model."""
        super().__init__()
        self.p, self.number, self.keys = p, number, keys

    def forward(self, x: Tensor) -> Tensor:
        """[..., T, features] to the same."""
        if not self.training:
            return x
        keys = self.keys.current
        if keys is None:
            raise RuntimeError("dropout in training needs the pack's keys (use_dropout_keys)")
        tokens = x.numel() // x.shape[-1]
        if len(keys) != tokens:  # a layer that takes some of the tokens, in an order of its own
            keys = keys[:1] + torch.arange(tokens, device=keys.device)
        layer_keys = _mix64(keys + _signed(self.number * _GOLDEN))
        return _Dropout.apply(x, (layer_keys >> 32).to(torch.int32), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def replace_adapter_dropout(model: Any) -> None:
    """Replace the dropout of each adapted layer of a PEFT model by `RowDropout`."""
    keys, number = DropoutKeys(), 0
    for module in model.modules():
        for name, layer in getattr(module, "lora_dropout", {}).items():
            if isinstance(layer, torch.nn.Dropout):
                number += 1
                module.lora_dropout[name] = RowDropout(layer.p, number, keys)
    if number:
        setattr(model, _KEYS, keys)


def turn_off_base_dropout(model: Any) -> dict[str, float]:
    """Set each dropout of a base model to 0; return what it was, by the names of its config.

    Models draw it in many ways, each from a stream of random numbers: as modules, in functions,
    in attention, or as whole layers that are skipped.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_dropout(vars(module))
    shares = _zero_dropout(vars(model.config.get_text_config()))
    # Of heads that a language model doesn't have.
    return {k: v for k, v in shares.items() if not k.startswith(("classifier", "summary"))}


def _zero_dropout(values: dict[str, Any]) -> dict[str, float]:
    """Set the shares among an object's attributes that are named after dropout to 0."""
    shares = {
        name: value
        for name, value in values.items()
        if "drop" in name and isinstance(value, float) and value
    }
    values.update(dict.fromkeys(shares, 0.0))
    return shares


@contextmanager
def use_dropout_keys(model: Any, pack: Pack, seed: int, step: int) -> Iterator[None]:
    """Let the model's dropout draw the masks of this pack within the context."""
    keys: DropoutKeys | None = getattr(model, _KEYS, None)
    if keys is None:
        yield
        return
    salt = _signed(((seed + 1) * _GOLDEN ^ step) * _GOLDEN)
    keys.current = _mix64(token_keys(pack) + salt)
    try:
        yield
    finally:
        keys.current = None


def token_keys(pack: Pack) -> Tensor:
    """Return a hash of each token's row up to the token, [T] int64.

    The sum of hashes of (position, token): sums wrap around, so that any order gives the same.
    """
    hashes = _mix64(pack.position_ids[0] * _signed(_GOLDEN) + pack.input_ids[0])
    sums = hashes.cumsum(0)
    lengths = torch.tensor(pack.row_lengths) - pack.shared_prefix  # in the pack
    lengths[0] += pack.shared_prefix
    starts = (lengths.cumsum(0) - lengths).to(sums.device)
    before = sums[starts] - hashes[starts]  # of the rows before
    if pack.shared_prefix:
        before[1:] -= sums[pack.shared_prefix - 1]
    return sums - before.repeat_interleave(lengths.to(sums.device), output_size=len(sums))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p = p
        return _drop(x, keys, p)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        (keys,) = ctx.saved_tensors
        return _drop(d_y, keys, ctx.p), None, None


def _drop(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """Return x [..., T, features] with the dropped features 0; `keys` are [T] int32."""
    level = min(_LEVELS - 1, round(p * _LEVELS))
    rows = x.reshape(-1, x.shape[-1])
    out = rows * (_LEVELS / (_LEVELS - level))
    features = _feature_keys(x.shape[-1], x.device)
    size = max(1, _BLOCK[x.device.type] // len(features))
    buffer = keys.new_empty(2, min(size, len(rows)), len(features))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        count = len(rows[part])
        random, spare = buffer[0, :count], buffer[1, :count]
        torch.add(keys[part, None], features, out=random)
        _mix32_(random, spare)
        halves = random.view(torch.int16)[:, : x.shape[-1]]  # two numbers in each
        out[part].masked_fill_(halves < level - _LEVELS // 2, 0)
    return out.view_as(x)


@lru_cache(maxsize=32)
def _feature_keys(features: int, device: torch.device) -> Tensor:
    """Return a key for each two features, [ceil(features / 2)] int32."""
    numbers = torch.arange((features + 1) // 2, dtype=torch.int64)
    return (_mix64(numbers + 1) >> 32).to(torch.int32).to(device)


def _mix64(x: Tensor) -> Tensor:
    """Return SplitMix64's finalizer of int64 numbers (Steele et al. 2014, Stafford's variant)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix32_(x: Tensor, spare: Tensor) -> None:
    """Apply Wellons' lowbias32 to int32 numbers, in place (https://nullprogram.com, 2018-07-31).

    Shifts of signed numbers repeat the sign, so its copies are cut off.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, _signed(0x846CA68B, 32)), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            x.mul_(factor)


def _signed(number: int, bits: int = 64) -> int:
    """Return the number modulo 2^bits in two's complement."""
    number %= 1 << bits
    return number - (1 << bits) if number >> (bits - 1) else number
