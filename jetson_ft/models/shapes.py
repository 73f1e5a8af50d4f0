"""What memory and time depend on in a model: its dimensions, without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jetson_ft.models import load
from jetson_ft.models.resolve import Base

_LOGIT_BYTES = 32 * 2**20  # of logits that exist at one time
# Of those in fp32 at one time: so few that a CPU's caches hold them; a GPU wants large kernels.
_PIECE_BYTES = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}


def head_rows(vocabulary: int, bytes_per_number: int, kind: str) -> tuple[int, int]:
    """Positions that the head projects at one time, and those of them whose softmax is made at
    one time (`models.loss`), on a device of that kind."""
    rows = max(16, _LOGIT_BYTES // (bytes_per_number * vocabulary))
    return rows, max(8, _PIECE_BYTES[kind] // (4 * vocabulary))


@dataclass(frozen=True)
class Linears:
    """Linear layers alike but for the layer they stand in; `*` for its number in the path."""

    path: str
    count: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Weights of all of them, without biases."""
        return self.count * self.inputs * self.outputs

    def is_named(self, target: str) -> bool:
        """As PEFT names layers: by the end of the path, at a dot."""
        return f".{self.path}".endswith("." + _starred(target))


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder; parameters are counted without their bytes."""

    layers: int
    hidden: int
    intermediate: int  # width inside the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms: int  # in a layer, over the hidden state
    kept_by_norms: int  # tensors of the hidden width that backward needs of them, in a layer
    tied: bool  # the head is the embedding
    kept_in_mlp: int  # tensors of the MLP's width that the backward pass needs
    linears: tuple[Linears, ...]  # what quantisation and adapters take
    other_parameters: int  # norms, biases

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers below the head."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding."""
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """Weights of the head beside the embedding; none where it is tied."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, each once."""
        return (
            self.linear_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.other_parameters
        )

    def adapted(self, targets: str | Sequence[str]) -> Iterator[Linears]:
        """The linear layers that `lora.targets` means."""
        names = [targets] if isinstance(targets, str) else targets
        for linear in self.linears:
            if targets == "all-linear" or any(linear.is_named(name) for name in names):
                yield linear

    def lora_parameters(self, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
        """Weights of both adapter matrices, over all adapted layers."""
        return sum(
            linear.count * rank * (linear.inputs + linear.outputs)
            for linear in self.adapted(targets)
        )


def of(base: Base) -> Shape:
    """The shape of a model on disk; no weights are read.

    Raises:
        UserError: transformers doesn't know its architecture, or the config is damaged.
    """
    known = KNOWN.get(base.name)
    return known or from_config(load.load_config(base))


def from_config(config: Any) -> Shape:
    """Counts a causal language model built from its transformers config, without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears = tuple(_linears(model, head))
    hidden, heads = config.hidden_size, config.num_attention_heads
    norms = _norms(model, hidden)
    tied = head.weight is embedding.weight
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(linear.parameters for linear in linears)
    counted += embedding.weight.numel() * (1 if tied else 2)
    return Shape(
        layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=embedding.weight.shape[0],
        norms=len(norms) // config.num_hidden_layers,
        kept_by_norms=_kept_by_norms(model, norms) // config.num_hidden_layers,
        tied=tied,
        kept_in_mlp=_kept_in_mlp(config, linears, intermediate),
        linears=linears,
        other_parameters=total - counted,
    )


def _linears(model: Any, head: Any) -> Iterator[Linears]:
    """Those of the same path and size together; GPT-2's are called Conv1D and lie transposed."""
    import torch
    from transformers.pytorch_utils import Conv1D

    counts: dict[tuple[str, int, int], int] = {}
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            sizes = module.weight.shape
            inputs, outputs = sizes if isinstance(module, Conv1D) else reversed(sizes)
            key = (_starred(path), inputs, outputs)
            counts[key] = counts.get(key, 0) + 1
    for (path, inputs, outputs), count in counts.items():
        yield Linears(path, count, inputs, outputs)


def _starred(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _norms(model: Any, hidden: int) -> list[Any]:
    """Norms over the hidden state; the one after the last layer vanishes in a division."""
    return [
        module
        for module in model.modules()
        if "Norm" in type(module).__name__
        and getattr(module, "weight", None) is not None
        and tuple(module.weight.shape) == (hidden,)
    ]


def _kept_by_norms(model: Any, norms: Sequence[Any]) -> int:
    """Their inputs, and the results that aren't made again.

    They are where `models.fused` knows the norm and `models.lora` the layers behind it.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    others = any(isinstance(module, Conv1D) for module in model.modules())
    known = [type(n) is torch.nn.LayerNorm or hasattr(n, "variance_epsilon") for n in norms]
    return sum(1 if made_again and not others else 2 for made_again in known)


def _kept_in_mlp(config: Any, linears: Sequence[Linears], intermediate: int) -> int:
    """An activation's inputs, its result, and with a gate the activated one too.

    Where `models.fused` knows the MLP, results are made again from the inputs.
    """
    widths = [linear.outputs for linear in linears if linear.inputs == config.hidden_size]
    gated = widths.count(intermediate) > 1 or 2 * intermediate in widths
    activation = getattr(config, "hidden_act", None) or ""
    known = {"silu": "mlp.gate_proj", "gelu_new": "mlp.fc1"}.get(activation, "")
    made_again = any(linear.is_named(known) for linear in linears)
    if gated:
        return 2 if made_again else 4
    return 1 if made_again else 2


def _phi_linears(layers: int, hidden: int, intermediate: int) -> tuple[Linears, ...]:
    attention = ("q_proj", "k_proj", "v_proj", "dense")
    return (
        *(
            Linears(f"model.layers.*.self_attn.{name}", layers, hidden, hidden)
            for name in attention
        ),
        Linears("model.layers.*.mlp.fc1", layers, hidden, intermediate),
        Linears("model.layers.*.mlp.fc2", layers, intermediate, hidden),
    )


def _llama_linears(layers: int, hidden: int, kv: int, intermediate: int) -> tuple[Linears, ...]:
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate), "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }  # fmt: skip
    return tuple(Linears(f"model.layers.*.{name}", layers, *size) for name, size in sizes.items())


# For planning where neither the model's files nor a network are at hand.
KNOWN = {
    "microsoft/phi-1_5": Shape(
        layers=24, hidden=2048, intermediate=8192, heads=32, kv_heads=32, head_dim=64,
        vocabulary=51200, norms=1, kept_by_norms=1, tied=False, kept_in_mlp=1,
        linears=_phi_linears(24, 2048, 8192), other_parameters=595_968,
    ),
    "embedded": Shape(
        layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64,
        vocabulary=49152, norms=2, kept_by_norms=2, tied=True, kept_in_mlp=2,
        linears=_llama_linears(30, 576, 192, 1536), other_parameters=35_136,
    ),
}  # fmt: skip
