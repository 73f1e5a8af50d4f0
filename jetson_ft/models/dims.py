"""The dimensions of a model, without its weights: what its memory and time depend on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that differ only in the number of their decoder layer."""

    path: str  # with `*` for that number
    count: int
    inputs: int
    outputs: int
    is_conv1d: bool = False  # transformers' Conv1D, whose weights are [inputs, outputs]

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
    other_parameters: int  # norms, biases

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
        widths = [linear.outputs for linear in self.linears if linear.inputs == self.hidden]
        return widths.count(self.intermediate) > 1 or 2 * self.intermediate in widths

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers below the head, without biases."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding; the head has as many, where it isn't tied to it."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        embedding_and_head = self.embedding_parameters * (1 if self.tied else 2)
        return self.linear_parameters + embedding_and_head + self.other_parameters

    def adapted(self, targets: str | Sequence[str]) -> list[LinearGroup]:
        # As in PEFT, whole names at the end of a layer's path are compared.
        if targets == "all-linear":
            return list(self.linears)
        names = [targets] if isinstance(targets, str) else targets
        ends = tuple(f".{_starred(name)}" for name in names)
        return [linear for linear in self.linears if f".{linear.path}".endswith(ends)]

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        adapted = self.adapted(targets)
        return sum(rank * linear.count * (linear.inputs + linear.outputs) for linear in adapted)


def dims_from_config(config: Any) -> ModelDims:
    """Count a causal language model built from its transformers config, without memory for it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear_counts: Counter[LinearGroup] = Counter()
    kinds: dict[str, list[ModuleKind]] = {}
    for path, module in model.named_modules():
        starred = _starred(path)
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            if module is not head:
                is_conv1d = isinstance(module, Conv1D)
                inputs, outputs = module.weight.shape if is_conv1d else module.weight.shape[::-1]
                linear_counts[LinearGroup(starred, 1, inputs, outputs, is_conv1d)] += 1
        elif "*." in starred:
            kinds.setdefault(starred, []).append(describe_module(module))
    linears = tuple(replace(linear, count=count) for linear, count in linear_counts.items())
    hidden, heads = config.hidden_size, config.num_attention_heads
    tied = head.weight is embedding.weight
    counted = sum(linear.parameters for linear in linears)
    counted += embedding.weight.numel() * (1 if tied else 2)
    return ModelDims(
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=embedding.weight.shape[0],
        tied=tied,
        linears=linears,
        modules=tuple(ModuleGroup(path, len(same), same[0]) for path, same in kinds.items()),
        other_parameters=sum(parameter.numel() for parameter in model.parameters()) - counted,
    )


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


def _starred(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
