"""Sizes of a model: parameters by part, bytes by format, memory of training on one or more boards.

Everything follows from the model's dimensions; no weights are read. `inside.quantization` reads one
weight matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from jetson_ft.data.lengths import LengthHistogram
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.inside.model import LoadedModel, View
from jetson_ft.models import catalog, files
from jetson_ft.models.dims import LinearGroup, ModelDims
from jetson_ft.models.loading import WeightFormat, weight_format
from jetson_ft.recipe import Recipe
from jetson_ft.training import cost_model
from jetson_ft.training.cost_model import Workload

TOKENS = 512  # of the micro-batch that the memory of training is counted for
BOARD_COUNTS = (1, 2, 4, 8)
# Formats of the weights; int8 and nf4 are those of linear layers, the rest stays in 16 bits.
FORMATS = {
    "fp32": WeightFormat("fp32"),
    "bf16": WeightFormat("bf16"),
    "int8": WeightFormat("bf16", "int8"),
    "nf4": WeightFormat("bf16", "nf4"),
}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_forward|ffn|experts?|\bfc\d|gate_up|moe", re.IGNORECASE)
_ADAM_MOMENTS = 8  # bytes a parameter: two numbers in fp32
_MASTER_WEIGHT = 4  # the fp32 copy that 16-bit weights are updated in


@dataclass(frozen=True)
class Part(View):
    """Parameters of one part of the model, and their bytes in each of `FORMATS`."""

    name: str  # embedding, attention, mlp, norms, other (biases, convolutions), head
    parameters: int
    bytes: dict[str, int]


@dataclass(frozen=True)
class TrainingMemory(View):
    """Peak bytes of one process that trains with micro-batches of `TOKENS`, by part."""

    method: str  # full, lora, qlora
    boards: int
    sharded: bool  # the layers are split among the boards; else each board has all of them
    format: str  # of the base's weights
    weights: int  # of base and adapter
    gradients: int
    optimizer: int
    activations: int
    other: int  # what exists for a moment; libraries

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other

    def to_json(self) -> dict[str, Any]:
        """Return the fields and their sum."""
        return {**super().to_json(), "total": self.total}


@dataclass(frozen=True)
class Numbers(View):
    """What the model's dimensions say about its size."""

    model: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    parameters: int
    rank: int
    adapter_parameters: int
    parts: list[Part]
    training: list[TrainingMemory]  # on one board
    boards: list[TrainingMemory]  # for each of `BOARD_COUNTS`
    tokens: int
    device: str
    device_memory: int  # bytes, those that are free


def view_numbers(loaded: LoadedModel) -> Numbers:
    """Return the numbers of a loaded model on this device."""
    return compute_numbers(loaded.recipe, detect.detect_device())


def compute_numbers(recipe: Recipe, device: Device) -> Numbers:
    """Return the numbers of the recipe's model and adapter on a device; no weights are read.

    Raises:
        UserError: the model's files can't be read.
    """
    dims = catalog.known_dims(recipe.model)
    dims = dims or catalog.model_dims(files.resolve_model(recipe.model, weights=False))
    lengths = LengthHistogram(1, TOKENS, ((float(TOKENS), TOKENS / 2),))
    weights = weight_format(recipe, device)
    plain = WeightFormat(weights.precision)
    workload = Workload(dims, plain, recipe.lora, recipe.train, lengths, heldout_tokens=0.0)
    quantized = replace(workload, weights=WeightFormat(weights.precision, "nf4"))
    return Numbers(
        model=recipe.model,
        layers=dims.layers,
        hidden=dims.hidden,
        intermediate=dims.intermediate,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        vocabulary=dims.vocabulary,
        tied=dims.tied,
        parameters=dims.parameters,
        rank=recipe.lora.rank,
        adapter_parameters=workload.lora_parameters,
        parts=model_parts(dims),
        training=[
            full_memory(workload, device),
            lora_memory(workload, device),
            lora_memory(quantized, device),
        ],
        boards=[
            memory(replace(workload, shards=count if sharded else 1), device, count)
            for memory in (full_memory, lora_memory)
            for sharded in (False, True)
            for count in BOARD_COUNTS
            if count > 1 or not sharded
        ],
        tokens=TOKENS,
        device=device.board or device.name,
        device_memory=device.memory_available,
    )


def model_parts(dims: ModelDims) -> list[Part]:
    """Return the parts with any parameters; these add up to the model's."""
    norms = sum(g.count * g.kind.width for g in dims.modules if "Norm" in g.kind.class_name)
    norms = min(norms + dims.hidden, dims.other_parameters)  # and the one before the head
    linears: dict[str, list[LinearGroup]] = {"attention": [], "mlp": [], "other": []}
    for group in dims.linears:
        kinds = {"attention": _ATTENTION, "mlp": _MLP}
        kind = next((name for name, names in kinds.items() if names.search(group.path)), "other")
        linears[kind].append(group)
    plain = {
        "embedding": dims.embedding_parameters,
        "mlp": dims.expert_parameters,
        "norms": norms,
        "other": max(0, dims.other_parameters - norms - dims.expert_parameters),
        "head": 0 if dims.tied else dims.embedding_parameters,
    }
    parts = []
    for name in ("embedding", "attention", "mlp", "norms", "other", "head"):
        groups, rest = linears.get(name, []), plain.get(name, 0)
        parameters = rest + sum(group.parameters for group in groups)
        sizes = {
            label: rest * weights.bytes_per_number
            + sum(cost_model.linear_bytes(group, weights) for group in groups)
            for label, weights in FORMATS.items()
        }
        if parameters:
            parts.append(Part(name, parameters, sizes))
    return parts


def lora_memory(workload: Workload, device: Device, boards: int = 1) -> TrainingMemory:
    """Return the memory of training an adapter beside the frozen base.

    The layers are split where `workload.shards` is more than one.
    """
    number, adapter = workload.weights.bytes_per_number, workload.lora_parameters
    parts = cost_model.predict_memory(workload, device, TOKENS, checkpointing=False)
    return TrainingMemory(
        method="lora" if workload.weights.quantize == "none" else "qlora",
        boards=boards,
        sharded=workload.shards > 1,
        format=str(workload.weights),
        weights=parts["weights"] + adapter * (4 + number),  # fp32, and a copy as the base's
        gradients=adapter * 4,
        optimizer=adapter * _ADAM_MOMENTS,
        activations=parts["activations"],
        other=parts["transient"] + parts["process"] + parts["context"],
    )


def full_memory(workload: Workload, device: Device, boards: int = 1) -> TrainingMemory:
    """Return the memory of training every weight with AdamW.

    In 16 bits that takes 16 bytes a parameter: weight, gradient, and in fp32 a copy of the weight
    and two moments (Rajbhandari et al. 2020, ZeRO, section 3.1). Sharded, as ZeRO's third stage and
    FSDP do it, each board has its part of all of these, and two layers that are gathered at a time.
    This project trains adapters only: the figures are for comparison.
    """
    dims, number, shards = workload.dims, workload.weights.bytes_per_number, workload.shards
    # A trained layer keeps its input for its own gradient, as a layer in int8 does for another
    # reason; it has no adapter.
    lora = workload.lora.model_copy(update={"rank": 0})
    keeps_inputs = WeightFormat(workload.weights.precision, "int8")
    like_int8 = replace(workload, weights=keeps_inputs, lora=lora)
    outputs = cost_model.COST_MODELS[device.kind].attention_outputs_kept
    kept = dims.layers * TOKENS * cost_model.layer_bytes(like_int8, outputs)
    parts = cost_model.predict_memory(replace(workload, shards=1), device, TOKENS, False)
    gathered = 2 * dims.linear_parameters // dims.layers if shards > 1 else 0
    own = -(-dims.parameters // shards)
    return TrainingMemory(
        method="full",
        boards=boards,
        sharded=shards > 1,
        format=str(workload.weights),
        weights=(own + gathered) * number,
        gradients=(own + gathered) * number,
        optimizer=own * (_ADAM_MOMENTS + (_MASTER_WEIGHT if number == 2 else 0)),
        activations=kept,
        other=parts["transient"] + parts["process"] + parts["context"],
    )
