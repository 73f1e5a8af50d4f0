"""Peak memory and time of a training before anything is loaded, and the plan that fits.

How a step is cut into micro-batches and whether activations are recomputed change memory and
speed, never the result: which rows form a step is the recipe's.

Memory, for micro-batches of T tokens:

    weights + 18 to 20 bytes a LoRA parameter + activations kept, per token x T
        + the largest of what exists for a moment + the process itself

Time: floating-point operations over the machine's rate for matrix products, times the share
of that rate which training reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from jetson_ft.data.lengths import Lengths
from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError
from jetson_ft.models import shapes
from jetson_ft.models.load import Weights
from jetson_ft.models.shapes import Shape
from jetson_ft.recipe import LoraRecipe, TrainRecipe
from jetson_ft.training import schedule


@dataclass(frozen=True)
class Costs:
    """What can't be counted from a model's shape. Bytes, tokens, and shares of one."""

    micro_batches: dict[int, tuple[int, ...]]  # tokens, fastest first, by bytes of a number
    process: int  # of Python with its libraries, in the memory that the plan is for
    context: int  # of the GPU's driver and libraries
    activations: float  # kept in fact, of what is counted
    results: int  # of attention that a layer keeps: where by row, its own and the packed one
    score: float  # bytes of one attention score of the longest row
    margin: float  # of the free memory, left alone
    efficiency: dict[int, float]  # of the rate for matrix products, by bytes of a number
    quantised: dict[str, float]  # what is left of the efficiency in each weight format


# Each value and where it comes from.
COSTS = {
    "cpu": Costs(
        # 1,024 is no faster in fp32, a little in bf16: docs/decisions/0009-few-shapes-for-onednn.md
        micro_batches={4: (512, 384, 256), 2: (768, 512, 384, 256)},
        process=640 * 10**6,  # fitted: benchmarks/plan_accuracy.py, rows `fit`, and runs of minutes
        context=0,
        activations=1.0,  # fitted likewise: holes of the heap and room in micro-batches are even
        results=1,
        score=4.0,  # generous: only one block of queries has its scores in memory at a time
        margin=0.05,  # chosen
        efficiency={4: 0.55, 2: 0.43},  # docs/measurements.md, "Planned and measured speed"
        quantised={"none": 1.0, "int8": 0.95, "nf4": 0.95},  # as fast, within the noise there
    ),
    "cuda": Costs(
        micro_batches=dict.fromkeys((4, 2), (4096, 2048, 1024, 512)),
        process=900 * 10**6,  # of Python with its libraries, measured where there was no GPU
        context=600 * 2**20,  # usual for a CUDA process with cuBLAS
        activations=1.0,  # fitted on an H100: benchmarks/plan_accuracy.py, rows `fit`
        results=2,  # PyTorch's kernels keep theirs
        score=4.0,  # as on a CPU
        margin=0.05,  # chosen
        # Guessed, from 0.16 seen with unfused code on an Orin NX 16GB.
        efficiency=dict.fromkeys((4, 2), 0.25),
        quantised={"none": 1.0, "int8": 0.8, "nf4": 0.9},  # nf4: LitGPT's table for an A100
    ),
}

_LORA_BYTES = 16  # fp32: weight, gradient, and AdamW's two moments
_NF4_BLOCK = 64  # weights that share a scale (QLoRA: Dettmers et al. 2023, section 3)
_NF4_SUPER_BLOCK = 256  # scales that share one, when they are quantised to a byte too


@dataclass(frozen=True)
class Work:
    """A training as the planner sees it."""

    shape: Shape
    weights: Weights
    lora: LoraRecipe
    train: TrainRecipe
    lengths: Lengths  # of the rows to learn, cut at `max_length`
    heldout_tokens: float
    shards: int = 1  # processes that the frozen layers are split among

    @property
    def lora_parameters(self) -> int:
        """Trained parameters."""
        return self.shape.lora_parameters(self.lora.rank, self.lora.targets)

    @property
    def bytes_per_number(self) -> int:
        """Of the arithmetic."""
        return 4 if self.weights.precision == "fp32" else 2


@dataclass(frozen=True)
class Plan:
    """Choices for one device; may differ between attempts of the same run."""

    micro_batch_tokens: int
    checkpointing: bool
    shards: int = 1  # processes that share the frozen layers; 1: each has all of them
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    parts: dict[str, int] = field(default_factory=dict)  # bytes of the peak, by what takes them

    def as_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


# --- choosing ----------------------------------------------------------------------------------


def choose(work: Work, device: Device, flops: float) -> Plan:
    """The fastest plan that fits.

    Args:
        device: its `memory_available` is what the whole process may take.
        flops: the device's rate for matrix products in the recipe's arithmetic, FLOP/s.

    Raises:
        UserError: none fits; it names settings that would, each with its predicted peak.
    """
    return best(work, device, flops) or _refuse(work, device)


def best(work: Work, device: Device, flops: float) -> Plan | None:
    """The fastest plan that fits, or None."""
    for plan in plans(work, device):
        if sum(plan.parts.values()) <= room(work, device):
            predicted = seconds(work, device.kind, flops, plan.checkpointing)
            return replace(plan, seconds=predicted)
    return None


def next_smaller(work: Work, device: Device, plan: Plan) -> Plan | None:
    """The fastest plan that takes less memory than this one; None: there is none."""
    for one in plans(work, device):
        # Where each row is alone, other micro-batches change nothing.
        other = plan.micro_batch_tokens > 0 or one.checkpointing > plan.checkpointing
        if other and (one.peak_memory_bytes or 0) < (plan.peak_memory_bytes or 0):
            return one
    return None


def grant(plan: Plan) -> float:
    """The `max_memory_gb` under which this plan is the fastest that fits."""
    return math.ceil((plan.peak_memory_bytes or 0) / 10**6) / 1000


def frugal(plans: Sequence[Plan]) -> Plan:
    """Of several processes' plans the one that takes the least memory."""
    return max(plans, key=lambda plan: (plan.checkpointing, -plan.micro_batch_tokens))


def room(work: Work, device: Device) -> float:
    """Bytes that the run may take: what the recipe grants, else what is free, less a margin."""
    if work.train.max_memory_gb:
        return work.train.max_memory_gb * 10**9
    return device.memory_available * (1 - COSTS[device.kind].margin)


def plans(work: Work, device: Device) -> Iterator[Plan]:
    """Every plan there is, fastest first; the last one takes the least memory."""
    for checkpointing in (False, True):
        for size in micro_batches(work, device.kind):
            parts = memory(work, device, size, checkpointing)
            yield Plan(size, checkpointing, work.shards, sum(parts.values()), None, parts)


def micro_batches(work: Work, kind: str) -> list[int]:
    """Sizes to try, largest first: no larger than a step, no smaller than the longest row."""
    step, longest = work.train.tokens_per_step, work.lengths.longest
    allowed = COSTS[kind].micro_batches[work.bytes_per_number]
    sizes = {max(longest, min(size, step)) for size in allowed}
    return sorted(sizes, reverse=True)


def least_memory(work: Work, device: Device) -> int:
    """Peak bytes of the plan that takes the least."""
    return min(sum(plan.parts.values()) for plan in plans(work, device))


def remedies(work: Work, device: Device, at_most: int = 4) -> list[tuple[str, int]]:
    """Settings with which the work would fit, and the least peak bytes predicted for each."""
    limit = room(work, device)
    peaks = ((settings, least_memory(changed, device)) for settings, changed in _smaller(work))
    return [(settings, peak) for settings, peak in peaks if peak <= limit][:at_most]


def _smaller(work: Work) -> Iterator[tuple[str, Work]]:
    """The work in smaller weight formats, with shorter rows or a lower rank, then with both."""
    formats = [*_smaller_formats(work)]
    yield from formats
    for change in (("", work), *formats[-1:]):
        yield from _shrunk(change)


def _smaller_formats(work: Work) -> Iterator[tuple[str, Work]]:
    weights = work.weights
    if weights.quantize == "none" and weights.precision == "fp32":
        yield "precision: bf16", _with_weights(work, precision="bf16")
    if weights.quantize == "none":
        yield "quantize: int8", _with_weights(work, quantize="int8")
    if weights.quantize != "nf4":
        yield "quantize: nf4", _with_weights(work, quantize="nf4")


def _shrunk(change: tuple[str, Work]) -> Iterator[tuple[str, Work]]:
    _, work = change
    for length, rank in ((512, 8), (256, 4)):
        if length < work.lengths.longest:
            yield _shorter(change, length)
        if rank < work.lora.rank:
            yield _lower_rank(change, rank)
        if length < work.lengths.longest and rank < work.lora.rank:
            yield _lower_rank(_shorter(change, length), rank)


def _with_weights(work: Work, **changes: Any) -> Work:
    return replace(work, weights=replace(work.weights, **changes))


def _shorter(change: tuple[str, Work], length: int) -> tuple[str, Work]:
    text, work = change
    shorter = replace(work, lengths=work.lengths.cut(length))
    return _joined(text, f"data.max_length: {length}"), shorter


def _lower_rank(change: tuple[str, Work], rank: int) -> tuple[str, Work]:
    text, work = change
    lora = work.lora.model_copy(update={"rank": rank})
    return _joined(text, f"lora.rank: {rank}"), replace(work, lora=lora)


def _joined(first: str, second: str) -> str:
    return f"{first}, {second}" if first else second


def _granted(work: Work, device: Device) -> str:
    if work.train.max_memory_gb:
        return f"train.max_memory_gb: {work.train.max_memory_gb:g}"
    return f"{device.memory_available / 2**30:.2f} GiB are free"


def _refuse(work: Work, device: Device) -> NoReturn:
    found = remedies(work, device)
    would = "; ".join(f"`{text}` ({size / 2**30:.2f} GiB)" for text, size in found)
    raise UserError(
        f"This job needs about {least_memory(work, device) / 2**30:.2f} GiB; it may take "
        f"{room(work, device) / 2**30:.2f} GiB ({_granted(work, device)}).",
        device.board or device.name,
        f"By prediction it would fit with {would}."
        if would
        else "Free some memory, or choose a smaller model: no setting of the recipe saves enough.",
    )


# --- memory ------------------------------------------------------------------------------------


def memory(work: Work, device: Device, tokens: int, checkpointing: bool) -> dict[str, int]:
    """Peak bytes by part, with micro-batches of `tokens`.

    On a GPU `process` and `context` are outside of what torch counts as allocated.
    """
    costs = COSTS[device.kind]
    per_layer = costs.activations * layer_bytes(work, costs.results)
    scores = costs.score * work.shape.heads * work.lengths.longest**2
    live = scores + (per_layer * tokens if checkpointing else 0)
    recomputed = work.bytes_per_number * work.shape.hidden + held_bytes(work)
    kept = recomputed if checkpointing else per_layer
    whole = weight_bytes(work.shape, work.weights)
    weights = whole if work.shards == 1 else split_bytes(work)
    adapter = (_LORA_BYTES + work.bytes_per_number) * work.lora_parameters  # and a copy to multiply
    activations = work.shape.layers * kept * tokens
    momentary = max(live, head_bytes(work, tokens, device.kind)) + dequantised_bytes(work)
    # A model that is split is loaded whole first, before anything else needs room.
    loading = max(0, whole - weights - adapter - activations - momentary)
    parts = {
        "weights": weights,
        "adapter": adapter,
        "activations": activations,
        "momentary": momentary + loading,
        "process": process_bytes(device),
        "context": costs.context,
    }
    return {name: math.ceil(size) for name, size in parts.items()}


def chat_bytes(shape: Shape, weights: Weights, device: Device) -> int:
    """Of a process that answers with this model; what its answers need is left to the margin."""
    costs = COSTS[device.kind]
    taken = weight_bytes(shape, weights) + process_bytes(device) + costs.context
    return math.ceil(taken * (1 + costs.margin))


def process_bytes(device: Device) -> int:
    """Of Python with its libraries, in the memory that the plan is for."""
    return COSTS[device.kind].process if device.shares_memory else 0


def weight_bytes(shape: Shape, weights: Weights) -> int:
    """Of the frozen weights: quantised in the linear layers below the head, nowhere else."""
    number = 4 if weights.precision == "fp32" else 2
    linear = shape.linear_parameters
    rest = number * (shape.parameters - linear)
    if weights.quantize == "int8":  # and an fp32 scale for each row
        return rest + linear + sum(4 * one.count * one.outputs for one in shape.linears)
    if weights.quantize == "nf4":
        scale = 1 + 4 / _NF4_SUPER_BLOCK if weights.double_quantize else 4
        return rest + math.ceil(linear * (0.5 + scale / _NF4_BLOCK))
    return rest + number * linear


def split_bytes(work: Work) -> float:
    """Of one process's part of the frozen weights, and two layers that are put together."""
    number, linear = work.bytes_per_number, work.shape.linear_parameters
    layers = linear / work.shards + 2 * linear / work.shape.layers
    return number * (work.shape.parameters - linear + min(linear, layers))


def layer_bytes(work: Work, results: int) -> int:
    """What one layer keeps of a token for the backward pass.

    Counted in numbers of the arithmetic's size: each norm's input and what isn't made again
    (hidden), query and key and value, `results` of attention, what the MLP keeps in its width, and
    the product of each adapter's first matrix (rank). Frozen linear layers keep nothing, but for
    int8. Dropout and DoRA keep each adapter's own input in fp32 besides.
    """
    shape = work.shape
    adapted = [*shape.adapted(work.lora.targets)]
    numbers = shape.kept_by_norms * shape.hidden
    numbers += shape.head_dim * ((1 + results) * shape.heads + 2 * shape.kv_heads)
    numbers += shape.intermediate * shape.kept_in_mlp
    numbers += work.lora.rank * sum(one.count for one in adapted) // shape.layers
    inputs = sum(one.count * one.inputs for one in adapted) // shape.layers
    copies = 4 * inputs if work.lora.dropout or work.lora.dora else 0
    if work.weights.quantize == "int8":  # what others make again
        numbers += shape.norms * shape.hidden + shape.intermediate
    return work.bytes_per_number * numbers + copies


def held_bytes(work: Work) -> int:
    """What int8 layers of bitsandbytes hold of a token even if recomputed: each one's input."""
    if work.weights.quantize != "int8":
        return 0
    shape = work.shape
    numbers = shape.norms * shape.hidden + shape.heads * shape.head_dim + shape.intermediate
    return work.bytes_per_number * numbers


def head_bytes(work: Work, tokens: int, kind: str) -> int:
    """Of the logits that exist at one time, and of all gradients that the head hands back.

    Logits become probabilities in fp32, those of a smaller arithmetic a few rows at a time.
    """
    shape, number = work.shape, work.bytes_per_number
    rows, few = shapes.head_rows(shape.vocabulary, number, kind)
    logits = number * min(tokens, rows) + (4 * min(tokens, few) if number < 4 else 0)
    return logits * shape.vocabulary + tokens * shape.hidden * number


def dequantised_bytes(work: Work) -> int:
    """Of the one weight matrix that is multiplied, where weights are quantised."""
    if work.weights.quantize == "none":
        return 0
    return work.bytes_per_number * max(one.inputs * one.outputs for one in work.shape.linears)


# --- time --------------------------------------------------------------------------------------


def flops_per_token(work: Work, checkpointing: bool) -> float:
    """Floating-point operations of a training step, over its tokens.

    A frozen matrix is multiplied forward and backward by the input's gradient, an adapter's
    once more for its own; causal attention sees half the row, and its backward pass repeats
    the forward one. Recomputing adds a forward pass of the body. The head is multiplied for
    the supervised tokens alone.
    """
    again = 1 if checkpointing else 0
    return (
        2 * work.shape.linear_parameters * (2 + again)
        + 2 * work.lora_parameters * (3 + again)
        + _attention_flops(work) * (3.5 + again)
        + 2 * _head_flops(work)
    )


def _forward_flops(work: Work) -> float:
    body = 2 * (work.shape.linear_parameters + work.lora_parameters)
    return body + _attention_flops(work) + _head_flops(work)


def _attention_flops(work: Work) -> float:
    shape = work.shape
    return 2 * shape.layers * shape.heads * shape.head_dim * work.lengths.row_of_a_token


def _head_flops(work: Work) -> float:
    return 2 * work.shape.embedding_parameters * work.lengths.supervised


def seconds(work: Work, kind: str, flops: float, checkpointing: bool) -> float:
    """Training time with the held-out measurements; early stopping is not foreseen.

    `max_minutes` bounds the training steps, as in a run.
    """
    costs = COSTS[kind]
    share = costs.efficiency[work.bytes_per_number] * costs.quantised[work.weights.quantize]
    rate = flops * share
    speed = rate / flops_per_token(work, checkpointing)
    tokens = tokens_to_train(work)
    if work.train.max_minutes:
        tokens = min(tokens, 60 * work.train.max_minutes * speed)
    measured = measurements(work, tokens) * work.heldout_tokens * _forward_flops(work) / rate
    return tokens / speed + measured


def tokens_to_train(work: Work) -> float:
    """Over all epochs and at most `max_steps`."""
    tokens = work.train.epochs * work.lengths.tokens
    if work.train.max_steps:
        tokens = min(tokens, work.train.max_steps * _tokens_of_a_step(work))
    return tokens


def measurements(work: Work, tokens: float) -> int:
    """How often the held-out rows are measured: before training, at intervals, at the end."""
    size = _tokens_of_a_step(work)
    steps = max(1, round(tokens / size))
    every = work.train.eval_every or schedule.choose_eval_every(
        [round(size)] * steps, round(work.heldout_tokens), steps
    )
    return 1 + math.ceil(steps / every)


def _tokens_of_a_step(work: Work) -> float:
    """A step ends with the row that reaches `tokens_per_step`: half a row over, on average."""
    return work.train.tokens_per_step + work.lengths.row_of_a_token / 2
