"""Attention probabilities of a text, by layer and head, as the model itself computes them.

transformers gets a function under a name of its own, as in `kernels.attention`. It calls the eager
attention of the model's own family, which knows grouped heads, sliding windows and soft caps, and
records the probabilities one layer at a time: only what a view shows is kept. Families without
transformers' attention interface are computed with `output_attentions`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _
from jetson_ft.inside.model import LoadedModel, View, each_side, logits_at, rounded, text_ids
from jetson_ft.inside.tokens import Token, describe_tokens
from jetson_ft.kernels.attention import use_attention

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 256  # of a text; memory and time grow with their square
MAX_VALUES = 1_000_000  # probabilities of a view
_RECORDED_ATTENTION = "jetson_ft_recorded"
_MASKED = -1.0  # what a mask adds to a score is 0, or the lowest number of its type

Matrix = list[list[float | None]]  # by query and key token; None: masked
# Of one layer: `layer`, its number; `query` [heads, tokens, head_dim]; `key` and `value`
# [key heads, tokens, head_dim]; `probs` [heads, tokens, tokens]; `output`
# [tokens, heads, head_dim]; `masked`, bool [tokens, tokens]; `options`, the attention function's
# other arguments.
Tensors = dict[str, Any]


@dataclass(frozen=True)
class LayerAttention(View):
    """The probabilities of one layer."""

    layer: int
    heads: dict[int, Matrix]
    mean: Matrix  # over all heads of the layer


@dataclass(frozen=True)
class SideAttention(View):
    """The probabilities of the base or of the adapter."""

    layers: list[LayerAttention]
    rollout: Matrix


@dataclass(frozen=True)
class AttentionView(View):
    """The attention of a text. In a matrix, a row is the token that attends."""

    tokens: list[Token]
    heads: dict[int, int]  # heads of each layer that has attention
    sides: dict[str, SideAttention]


@dataclass
class _Recorder:
    """What a view shows of one side, collected layer by layer.

    `rollout` is attention rollout: the product over the layers of the heads' mean, mixed in equal
    parts with the identity, which stands for the residual connection (Abnar and Zuidema,
    Quantifying Attention Flow in Transformers, 2020).
    """

    layers: Sequence[int] | None  # to show; None: all
    heads: Sequence[int] | None
    sides: int  # of the view, which share `MAX_VALUES`
    head_counts: dict[int, int] = field(default_factory=dict)
    recorded: list[LayerAttention] = field(default_factory=list)
    rollout: torch.Tensor | None = None
    _values: int = 0

    def add(self, layer: int, probs: torch.Tensor, masked: torch.Tensor) -> None:
        """Add a layer's probabilities [heads, tokens, tokens]; `masked` is bool [tokens, tokens].

        Raises:
            UserError: there is no such head, or the view would have too many numbers.
        """
        import torch

        count, size = len(probs), probs.shape[-1]
        self.head_counts[layer] = count
        mean = probs.float().mean(0)
        mixed = (mean + torch.eye(size, device=mean.device)) / 2
        self.rollout = mixed if self.rollout is None else mixed @ self.rollout
        if self.layers is not None and layer not in self.layers:
            return
        heads = range(count) if self.heads is None else self.heads
        for head in heads:
            _check_head(head, layer, count)
        self._values += (len(heads) + 1) * size**2
        if (self._values + size**2) * self.sides > MAX_VALUES:  # with those of the rollout
            raise UserError(
                _("These are more numbers than a view shows: {tokens:,} tokens, of {layers} layers "
                  "and more."),
                fix=_("Choose fewer layers and heads, or shorten the text."),
                tokens=size, layers=len(self.recorded) + 1,
            )  # fmt: skip
        maps = {head: _matrix(probs[head], masked) for head in heads}
        self.recorded.append(LayerAttention(layer, maps, _matrix(mean, masked)))


def _matrix(probs: torch.Tensor, masked: torch.Tensor) -> Matrix:
    """Return probabilities [tokens, tokens] as lists, with None where they are masked."""
    return rounded(probs.float().masked_fill(masked, float("nan")))


def view_attention(
    loaded: LoadedModel,
    text: str,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AttentionView:
    """Return the attention probabilities of a text, for the base and for the adapter.

    Args:
        layers: those to show; None: all.
        heads: those to show of each layer; None: all.

    Raises:
        UserError: the text is empty or too long, there is no such layer or head, the model has no
            attention, or the view would have more than `MAX_VALUES` numbers.
    """
    ids = text_ids(loaded, text, MAX_TOKENS)
    head_counts: dict[int, int] = {}

    def compute() -> SideAttention:
        import torch

        recorder = _Recorder(layers, heads, sides=1 + loaded.has_adapter)
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)

        def record(tensors: Tensors) -> None:
            recorder.add(tensors["layer"], tensors["probs"], tensors["masked"])

        run_recorded(loaded.model, ids, record)
        if not recorder.head_counts:
            for layer, probs in enumerate(_output_attentions(loaded.model, ids)):
                recorder.add(layer, probs, causal.to(probs.device))
        head_counts.update(recorder.head_counts)
        _check_layers(layers, head_counts)
        assert recorder.rollout is not None
        # Over many layers most of it comes from the first token; the others' parts are small.
        later = causal.to(recorder.rollout.device)
        rollout = rounded(recorder.rollout.masked_fill(later, float("nan")), is_relative=True)
        return SideAttention(recorder.recorded, rollout)

    sides = each_side(loaded, compute)
    return AttentionView(describe_tokens(loaded.tokenizer, ids), head_counts, sides)


def _check_layers(layers: Sequence[int] | None, head_counts: dict[int, int]) -> None:
    """Raise `UserError` if the model has no attention, or not in each of these layers."""
    if not head_counts:
        raise UserError(
            _("The model gives no attention probabilities."),
            fix=_("Its family computes them in another way; the other views work."),
        )
    missing = [layer for layer in layers or () if layer not in head_counts]
    if missing:
        raise UserError(
            _("Layer {layer} has no attention; the layers that have it are {layers}."),
            layer=missing[0], layers=", ".join(map(str, head_counts)),
        )  # fmt: skip


def _check_head(head: int, layer: int, count: int) -> None:
    """Raise `UserError` if the layer, of `count` heads, has no such head."""
    if not 0 <= head < count:
        raise UserError(
            _("There is no head {head}: layer {layer} has heads 0 to {last}."),
            head=head, layer=layer, last=count - 1,
        )  # fmt: skip


def run_recorded(model: Any, ids: Sequence[int], record: Callable[[Tensors], None]) -> None:
    """Run the model on a text, and call `record` with the attention of each layer."""
    from transformers.masking_utils import eager_mask

    calls = 0

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        family = sys.modules[type(module).__module__]
        output, probs = family.eager_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        layer = getattr(module, "layer_idx", None)
        tensors = {"query": query, "key": key, "value": value, "probs": probs, "output": output}
        record(
            {name: tensor[0] for name, tensor in tensors.items()}
            | {"layer": calls if layer is None else layer, "options": options}
            | {"masked": _masked(attention_mask, probs[0])}
        )
        calls += 1
        return output, probs

    with use_attention(model, _RECORDED_ATTENTION, attend, eager_mask):
        logits_at(model, ids, [len(ids) - 1])


def _masked(mask: Any, probs: torch.Tensor) -> torch.Tensor:
    """Return which keys a query may not see: bool [tokens, tokens]."""
    import torch

    size = probs.shape[-1]
    if mask is None:
        return torch.ones(size, size, dtype=torch.bool, device=probs.device).triu(1)
    mask = mask[0, 0]
    return ~mask if mask.dtype == torch.bool else mask < _MASKED


def _output_attentions(model: Any, ids: Sequence[int]) -> list[torch.Tensor]:
    """Return each layer's probabilities [heads, tokens, tokens], of families of older design.

    Nothing is returned where they would not be those that the model computes with.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    config = model.config
    before = config._attn_implementation
    # These families don't switch; but this decides whether they get a mask, which other kernels
    # don't need for causal attention (Falcon's probabilities would not be causal).
    config._attn_implementation = "eager"
    try:
        result = model(
            input_ids=torch.tensor([ids], device=device), use_cache=False, output_attentions=True
        )  # fmt: skip
    finally:
        config._attn_implementation = before
    layers = [
        probs[0]
        for probs in getattr(result, "attentions", None) or ()
        if probs is not None and probs.ndim == 4
    ]
    return layers if all(not probs.triu(1).any() for probs in layers) else []


# --- one head with its numbers ------------------------------------------------------------------


@dataclass(frozen=True)
class HeadVectors(View):
    """Query, key and value of one token in one head, with positions (rotary) in them."""

    position: int
    query: list[float]  # [head_dim], as key and value
    key: list[float]
    value: list[float]


@dataclass(frozen=True)
class HeadExample(View):
    """How one token attends, step by step; lists by key token have None where it is masked.

    `scaled` is `products` times `scaling`, and within the soft cap where the model has one:
    softcap * tanh(score / softcap). `softmax` is computed from `scaled`; `probabilities` are the
    model's own.
    """

    products: list[float | None]  # of the query with each key
    scaled: list[float | None]
    softmax: list[float | None]
    probabilities: list[float | None]
    # The largest between the last two: rounding, up to 0.01 where the model computes in 16 bits.
    # It is more where the family adds biases of positions, or sinks.
    difference: float
    output: list[float]  # sum of the values, weighted by the probabilities: [head_dim]
    tokens: list[HeadVectors]  # the token that attends, and another one


@dataclass(frozen=True)
class AttentionExample(View):
    """One head of one layer with real numbers."""

    tokens: list[Token]
    layer: int
    head: int
    key_head: int  # several heads share one key and value with grouped queries
    position: int  # of the token that attends
    other: int  # the second token whose vectors are shown
    scaling: float
    softcap: float | None
    shapes: dict[str, list[int]]
    sides: dict[str, HeadExample]


def view_attention_example(
    loaded: LoadedModel,
    text: str,
    layer: int | None = None,
    head: int = 0,
    position: int | None = None,
    other: int | None = None,
) -> AttentionExample:
    """Return one head's attention from one token, as numbers that can be checked by hand.

    Args:
        layer: None: the middle one.
        position: the token that attends; None: the last.
        other: a second token; None: the one that the base attends to most, besides the first.

    Raises:
        UserError: the text is empty or too long, there is no such layer, head or token, or the
            family has no attention interface.
    """
    ids = text_ids(loaded, text, MAX_TOKENS)
    if layer is None:
        layer = loaded.model.config.get_text_config().num_hidden_layers // 2
    position = len(ids) - 1 if position is None else position
    for place in (position, other or 0):
        if not 0 <= place < len(ids):
            raise UserError(
                _("There is no token {number}: the text has tokens 0 to {last}."),
                number=place, last=len(ids) - 1,
            )  # fmt: skip
    recorded: dict[str, Any] = {}
    head_counts: dict[int, int] = {}

    def compute() -> HeadExample:
        nonlocal other

        def record(tensors: Tensors) -> None:
            head_counts[tensors["layer"]] = len(tensors["probs"])
            if tensors["layer"] == layer:
                recorded.update(tensors)

        run_recorded(loaded.model, ids, record)
        _check_layers([layer], head_counts)
        _check_head(head, layer, head_counts[layer])
        if other is None:
            row = recorded["probs"][head, position].clone()
            row[[0, position]] = -1  # most heads attend to the first token, or to the same one
            other = int(row.argmax())
        return _head_example(recorded, head, position, other)

    sides = each_side(loaded, compute)
    assert other is not None
    shapes = {
        name: list(recorded[name].shape) for name in ("query", "key", "value", "probs", "output")
    }
    return AttentionExample(
        describe_tokens(loaded.tokenizer, ids), layer, head, _key_head(recorded, head), position,
        other, _scaling(recorded), recorded["options"].get("softcap"), shapes, sides,
    )  # fmt: skip


def _key_head(tensors: Tensors, head: int) -> int:
    return int(head * len(tensors["key"]) // len(tensors["query"]))


def _scaling(tensors: Tensors) -> float:
    scaling = tensors["options"].get("scaling")
    return float(tensors["query"].shape[-1] ** -0.5 if scaling is None else scaling)


def _head_example(tensors: Tensors, head: int, position: int, other: int) -> HeadExample:
    import torch

    key_head = _key_head(tensors, head)
    queries = tensors["query"][head].float()
    keys, values = (tensors[name][key_head].float() for name in ("key", "value"))
    probs, masked = tensors["probs"][head, position].float(), tensors["masked"][position]
    products = (keys @ queries[position]).masked_fill(masked, float("nan"))
    scaled = products * _scaling(tensors)
    if softcap := tensors["options"].get("softcap"):
        scaled = softcap * torch.tanh(scaled / softcap)
    softmax = scaled.masked_fill(masked, -torch.inf).softmax(0)
    return HeadExample(
        products=rounded(products),
        scaled=rounded(scaled),
        softmax=rounded(softmax.masked_fill(masked, float("nan"))),
        probabilities=rounded(probs.masked_fill(masked, float("nan"))),
        difference=float((softmax - probs).abs().max()),
        output=rounded(tensors["output"][position, head]),
        tokens=[
            HeadVectors(at, rounded(queries[at]), rounded(keys[at]), rounded(values[at]))
            for at in (position, other)
        ],
    )
