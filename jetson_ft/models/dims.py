"""The dimensions of a model, without its weights: what its memory and time depend on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.models import layers as model_layers
from jetson_ft.models import supported


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that differ only in the number of their decoder layer."""

    path: str  # with `*` for that number
    count: int
    inputs: int
    outputs: int
    is_conv1d: bool = False  # transformers' Conv1D, whose weights are [inputs, outputs]
    is_quantized: bool = True  # where the recipe quantizes; bitsandbytes passes over some layers
    no_adapter: str = ""  # why it can't have an adapter (constants of `models.layers`); "": it can

    @property
    def parameters(self) -> int:
        return self.count * self.inputs * self.outputs


@dataclass(frozen=True)
class ModuleKind:
    """What a module is, by names alone."""

    class_name: str
    children: Mapping[str, str] = field(default_factory=dict)  # class names by attribute
    epsilon: str = ""  # attribute that holds a norm's epsilon
    width: int = 0  # size of a one-dimensional weight


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that are not linear layers and differ only in the number of their decoder layer."""

    path: str  # with `*` for that number
    count: int
    kind: ModuleKind


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a decoder; parameters are counted without their bytes."""

    layers: int
    hidden: int
    intermediate: int  # width inside the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding
    linears: tuple[LinearGroup, ...]  # what quantization and adapters apply to
    modules: tuple[ModuleGroup, ...]  # the other modules of the decoder layers
    other_parameters: int  # norms, biases, experts
    embedding_width: int = 0  # 0: as wide as the hidden state
    expert_parameters: int = 0  # of experts that are stored as one tensor
    experts_used: float = 1.0  # share of them that a token passes through

    @property
    def norms(self) -> list[ModuleGroup]:
        """Norms over the hidden state in the decoder layers."""
        norms = [group for group in self.modules if "Norm" in group.kind.class_name]
        return [group for group in norms if group.kind.width == self.hidden]

    @property
    def norms_per_layer(self) -> int:
        return sum(group.count for group in self.norms) // self.layers

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate: two projections into its width, or one of twice that."""
        if self.expert_parameters:
            return True
        widths = [linear.outputs for linear in self.linears if linear.inputs == self.hidden]
        return widths.count(self.intermediate) > 1 or 2 * self.intermediate in widths

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers below the head, without biases."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding; the head has as many, where it isn't tied to it."""
        return self.vocabulary * (self.embedding_width or self.hidden)

    @property
    def parameters(self) -> int:
        embedding_and_head = self.embedding_parameters * (1 if self.tied else 2)
        return self.linear_parameters + embedding_and_head + self.other_parameters

    def adapted(self, targets: str | Sequence[str]) -> list[LinearGroup]:
        """Return the layers that get an adapter."""
        # As in PEFT, whole names at the end of a layer's path are compared.
        names = [targets] if isinstance(targets, str) else targets
        ends = ("",) if targets == "all-linear" else tuple(f".{starred(name)}" for name in names)
        linears = [linear for linear in self.linears if not linear.no_adapter]
        return [linear for linear in linears if f".{linear.path}".endswith(ends)]

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        adapted = self.adapted(targets)
        return sum(rank * linear.count * (linear.inputs + linear.outputs) for linear in adapted)

    @property
    def quantized_parameters(self) -> int:
        """Weights that are quantized where the recipe says so."""
        return sum(linear.parameters for linear in self.linears if linear.is_quantized)

    def coverage(self, rank: int, targets: str | Sequence[str], quantize: str = "none") -> Coverage:
        """Return how much of the model adapters and quantization apply to."""
        adapted = sum(linear.parameters for linear in self.adapted(targets))
        quantized = self.quantized_parameters if quantize != "none" else 0
        notes = []
        if self.expert_parameters:
            share = self.expert_parameters / self.parameters
            note = _("The experts, {share:.0%} of the parameters, get no adapter.")
            if quantize != "none":
                note = _(
                    "The experts, {share:.0%} of the parameters, get no adapter and are not "
                    "quantized: each layer stores them as one tensor."
                )
            notes.append(Message(note, {"share": share}))
        others = [linear for linear in self.linears if linear.no_adapter]
        if any(linear.no_adapter == model_layers.OTHER_INPUTS for linear in others):
            note = _("The layers for images, sound or an encoder get no adapter: rows are text.")
            notes.append(Message(note))
        skipped = {
            linear.path.rpartition(".")[2]
            for linear in others
            if linear.no_adapter != model_layers.OTHER_INPUTS
        }
        if skipped:
            note = _("An adapter isn't possible on these layers of this model: {names}.")
            notes.append(Message(note, {"names": ", ".join(sorted(skipped))}))
        passed_over = sum(linear.parameters for linear in self.linears if not linear.is_quantized)
        if quantize != "none" and passed_over:
            note = _(
                "bitsandbytes does not quantize some of the linear layers: {share:.0%} of the "
                "parameters."
            )
            notes.append(Message(note, {"share": passed_over / self.parameters}))
        return Coverage(
            parameters=self.parameters,
            adapter_parameters=self.lora_parameters(rank, targets),
            adapted_share=adapted / self.parameters,
            quantized_share=quantized / self.parameters,
            notes=notes,
        )


@dataclass(frozen=True)
class Coverage:
    """How much of a model has an adapter beside it, and how much is quantized."""

    parameters: int  # of the base model
    adapter_parameters: int
    adapted_share: float  # base weights beside which an adapter stands, of all base weights
    quantized_share: float
    notes: list[Message]  # on layers that are left out

    def as_message(self) -> Message:
        """Return one sentence."""
        text = _(
            "{adapter:,} adapter parameters, on {adapted:.1%} of {parameters:,}; "
            "{quantized:.1%} quantized."
        )
        values = {"adapter": self.adapter_parameters, "adapted": self.adapted_share}
        values |= {"parameters": self.parameters, "quantized": self.quantized_share}
        return Message(text, values)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": [str(note) for note in self.notes]}


def dims_from_config(config: Any) -> ModelDims:
    """Count a causal language model built from its transformers config, without memory for it.

    Raises:
        UserError: the model can't be trained, or transformers can't build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        supported.check_config(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        supported.check_model(model)
        return _count(model, config.get_text_config())
    except UserError:
        raise
    except Exception as error:  # whatever the code of an architecture raises for odd values
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            _("transformers can't build this model from its config.json: {error}"),
            supported.model_label(config),
            _("Download config.json again; if it is as published, choose another model."),
            error=lines[0],
        ) from error


def _count(model: Any, config: Any) -> ModelDims:
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    no_adapter = model_layers.linear_layers(model)
    quantized = model_layers.quantized_layers(model)
    linear_counts: Counter[LinearGroup] = Counter()
    kinds: dict[str, list[ModuleKind]] = {}
    expert_parameters = 0
    for path, module in model.named_modules():
        star_path = starred(path)
        if path in no_adapter:
            is_conv1d = isinstance(module, Conv1D)
            inputs, outputs = module.weight.shape if is_conv1d else module.weight.shape[::-1]
            linear_counts[LinearGroup(
                star_path, 1, inputs, outputs, is_conv1d, path in quantized, no_adapter[path]
            )] += 1  # fmt: skip
        elif "*." in star_path:
            kinds.setdefault(star_path, []).append(describe_module(module))
        for parameter in module.parameters(recurse=False):
            if model_layers.is_expert_tensor(module, parameter):
                expert_parameters += parameter.numel()
    linears = tuple(replace(linear, count=count) for linear, count in linear_counts.items())
    layers = _mean(config, "num_hidden_layers", default=1)
    hidden = _mean(config, "hidden_size", default=embedding.weight.shape[1])
    heads = _mean(config, "num_attention_heads", default=1)
    intermediate = _mean(config, "intermediate_size", default=4 * hidden)
    experts_used = 1.0
    if expert_parameters:
        chosen = _mean(config, "num_experts_per_tok", default=_mean(config, "moe_k", default=2))
        count = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
        experts_used = min(1.0, chosen / count) if count else 1.0
        width = _mean(config, "moe_intermediate_size", default=intermediate)
        intermediate = max(intermediate, chosen * width)
    tied = head.weight is embedding.weight
    counted = sum(linear.parameters for linear in linears)
    counted += embedding.weight.numel() * (1 if tied else 2)
    width = embedding.weight.shape[1]
    return ModelDims(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=_mean(config, "num_key_value_heads", default=heads),
        head_dim=_mean(config, "head_dim", default=hidden // heads),
        vocabulary=embedding.weight.shape[0],
        tied=tied,
        linears=linears,
        modules=tuple(ModuleGroup(path, len(same), same[0]) for path, same in kinds.items()),
        other_parameters=sum(parameter.numel() for parameter in model.parameters()) - counted,
        embedding_width=0 if width == hidden else width,
        expert_parameters=expert_parameters,
        experts_used=experts_used,
    )


def _mean(config: Any, name: str, default: int) -> int:
    """Return a number of the config; where it differs between layers, the mean rounded up."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # it differs, and is in `per_layer_config` only
        value = [getattr(layer, name) for layer in config.per_layer_config]
    if isinstance(value, (list, tuple)):
        numbers = [number for number in value if isinstance(number, (int, float)) and number > 0]
        value = math.ceil(sum(numbers) / len(numbers)) if numbers else None
    return int(value) if value else default


def _first(config: Any, *names: str) -> int:
    """Return the first of these numbers that the config has, or 0."""
    return next((value for name in names if (value := _mean(config, name, default=0))), 0)


def describe_module(module: Any) -> ModuleKind:
    """Return what a torch module is, by names alone."""
    weight: Any = getattr(module, "weight", None)
    numbers = (name for name, value in vars(module).items() if isinstance(value, float))
    return ModuleKind(
        class_name=type(module).__name__,
        children={name: type(child).__name__ for name, child in module.named_children()},
        epsilon=next((name for name in numbers if "eps" in name), ""),
        width=weight.shape[0] if getattr(weight, "ndim", 0) == 1 else 0,
    )


def starred(path: str) -> str:
    """Return a path with `*` for each number in it."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
