"""Predict peak memory and time of a training run from a model's dimensions; nothing is loaded.

Memory, for micro-batches of T tokens:

    weights + 18 to 20 bytes per LoRA parameter + activations kept, per token x T
        + the largest of what exists for a moment (transient) + the process itself

The comparison after training keeps keys and values (the cache) in place of activations.

Time: floating-point operations over the machine's rate for matrix products, times the share
of that rate which training reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

from jetson_ft.adapter import check_target_modules
from jetson_ft.data.lengths import LengthHistogram, longest_prompt, measure_lengths
from jetson_ft.data.prepare import PreparedRows
from jetson_ft.data.tokenize import token_counts
from jetson_ft.hardware.detect import Device
from jetson_ft.kernels.families import head_chunk_rows, saved_tensors
from jetson_ft.models import catalog
from jetson_ft.models.dims import Coverage, LinearGroup, ModelDims
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, check_vocabulary
from jetson_ft.recipe import LoraRecipe, Recipe, TrainRecipe
from jetson_ft.training import batches


@dataclass(frozen=True)
class CostModel:
    """Constants that can't be counted from a model's dimensions. Bytes, tokens, shares of one."""

    micro_batches: dict[int, tuple[int, ...]]  # tokens, fastest first, by bytes of a number
    process: int  # Python with its libraries, in the memory that the plan is for
    context: int  # the GPU's driver and libraries
    attention_outputs_kept: int  # tensors of attention's result that a layer keeps
    efficiency: dict[int, float]  # share of the matrix rate reached, by bytes of a number
    quantized: dict[str, float]  # factor on the efficiency, by weight format


# Each value and where it comes from.
COST_MODELS = {
    "cpu": CostModel(
        # 1,024 is no faster in fp32 (docs/measurements/speed-fp32.md), a little in bf16.
        micro_batches={4: (512, 384, 256), 2: (768, 512, 384, 256)},
        process=640 * 10**6,  # fitted: benchmarks/plan_accuracy.py, rows `fit`, and runs of minutes
        context=0,
        attention_outputs_kept=1,
        efficiency={4: 0.55, 2: 0.43},  # docs/measurements/plan-speed.md
        quantized={"none": 1.0, "int8": 0.95, "nf4": 0.95},  # as fast, within the noise there
    ),
    "cuda": CostModel(
        micro_batches=dict.fromkeys((4, 2), (4096, 2048, 1024, 512)),
        process=900 * 10**6,  # measured on a machine without a GPU
        context=600 * 2**20,  # usual for a CUDA process with cuBLAS
        # Row by row: PyTorch's kernels keep theirs, beside the packed one.
        attention_outputs_kept=2,
        # Guessed, from 0.16 seen with unfused code on an Orin NX 16GB.
        efficiency=dict.fromkeys((4, 2), 0.25),
        quantized={"none": 1.0, "int8": 0.8, "nf4": 0.9},  # nf4: LitGPT's table for an A100
    ),
}

MARGIN = 0.05  # chosen: share of the free memory that is kept free
# Bytes per attention score (fp32); an upper bound, as a CPU holds one block of queries at a time.
_SCORE_BYTES = 4
MAX_REPLY_BATCH = 36  # `inference.generate` has the same number
# Measured in bf16 on a CPU of 440 GFLOP/s, with the embedded model and the 66 held-out rows of
# `bundled`: replies of 48 tokens for either side took 27 s.
_REPLY_EFFICIENCY = 0.8  # of the rate of training
STEP_COST = 32  # of a decoding step, in prompt tokens; `inference.generate` has the same number
# The probes: 8,000 tokens of prompts and choices (of the embedded model's tokenizer), and ten
# replies of 16 tokens in one batch.
_PROBE_TOKENS = 8_000 + 16 * (10 + STEP_COST)
_START_SECONDS = 8.0  # measured on a CPU, most of it imports
_LOAD_BYTES_PER_SECOND = 5e8  # guessed, for an NVMe disk
_LORA_BYTES = 16  # fp32: weight, gradient, and AdamW's two moments
_NF4_BLOCK = 64  # weights that share a scale (QLoRA: Dettmers et al. 2023, section 3)
_NF4_SUPER_BLOCK = 256  # scales that share one, when they are quantized to a byte too


@dataclass(frozen=True)
class Workload:
    """What the memory and time of a training run depend on, beside the device."""

    dims: ModelDims
    weights: WeightFormat
    lora: LoraRecipe
    train: TrainRecipe
    lengths: LengthHistogram  # of the training rows, cut at `max_length`
    heldout_tokens: float
    shards: int = 1  # processes that the frozen layers are split among
    heldout_rows: int = 0
    longest_prompt: int = 0  # tokens, of the comparison
    reply_tokens: int = 0  # at most, of a reply in the comparison

    @property
    def lora_parameters(self) -> int:
        """Weights of all adapter matrices."""
        return self.dims.lora_parameters(self.lora.rank, self.lora.target_modules)

    @property
    def coverage(self) -> Coverage:
        """How much of the model adapters and quantization apply to."""
        return self.dims.coverage(self.lora.rank, self.lora.target_modules, self.weights.quantize)

    @property
    def tokens_in_step(self) -> float:
        """Mean tokens of a step: the row that reaches `tokens_per_step` adds half of its own."""
        return self.train.tokens_per_step + self.lengths.token_weighted_mean_length / 2


def describe_workload(
    recipe: Recipe, weights: WeightFormat, base: BaseModelFiles, rows: PreparedRows
) -> Workload:
    """Return a recipe's workload; of the model only the config is read.

    Raises:
        UserError: the model can't be trained, or the recipe's rows or target modules don't fit it.
    """
    dims = catalog.model_dims(base)
    texts = chain(rows.train["input_ids"], rows.heldout["input_ids"])
    check_vocabulary(rows.tokenizer, dims.vocabulary, base, texts=texts)
    check_target_modules(dims, recipe.lora.target_modules)
    return Workload(
        dims=dims,
        weights=weights,
        lora=recipe.lora,
        train=recipe.train,
        lengths=measure_lengths(rows.train),
        heldout_tokens=float(token_counts(rows.heldout).sum()),
        heldout_rows=len(rows.heldout),
        longest_prompt=longest_prompt(rows.heldout),
        reply_tokens=recipe.eval.max_new_tokens,
    )


# --- memory ------------------------------------------------------------------------------------


def predict_memory(
    workload: Workload, device: Device, tokens: int, checkpointing: bool
) -> dict[str, int]:
    """Return the peak bytes of training by part.

    On a GPU torch counts neither `process` nor `context`.
    """
    costs, dims = COST_MODELS[device.kind], workload.dims
    number = workload.weights.bytes_per_number
    # What is counted is what was measured: benchmarks/plan_accuracy.py, rows `fit`.
    kept = layer_bytes(workload, costs.attention_outputs_kept)
    layer_transient = _SCORE_BYTES * dims.heads * workload.lengths.longest**2
    if checkpointing:  # one layer's activations exist for a moment, all layers' inputs throughout
        layer_transient += kept * tokens
        inputs = dims.hidden
        if workload.weights.quantize == "int8":  # bitsandbytes' layers hold their inputs as well
            inputs += dims.norms_per_layer * dims.hidden
            inputs += dims.heads * dims.head_dim + dims.intermediate
        kept = number * inputs
    activations = dims.layers * kept * tokens
    transient = max(layer_transient, head_bytes(workload, tokens, device.kind))
    return _memory_by_part(workload, device, activations, transient)


def predict_reply_memory(
    workload: Workload, device: Device, rows: int, width: int
) -> dict[str, int]:
    """Return the peak bytes of the comparison by part, for a batch of replies.

    Args:
        rows: prompts of the batch.
        width: tokens of its longest prompt; the others are padded.
    """
    dims, number = workload.dims, workload.weights.bytes_per_number
    # Keys and values of all layers; one layer's are copied as they grow by a token.
    cached = (dims.layers + 1) * 2 * dims.kv_heads * dims.head_dim
    cache = number * cached * rows * (width + workload.reply_tokens)
    # The prompts pass one layer at a time: what was measured for a gated MLP on a CPU.
    inside = max(5 * dims.intermediate, 6 * dims.heads * dims.head_dim)
    layer = rows * width * number * (3 * dims.hidden + inside)
    layer += rows * width**2 * (1 + number)  # the mask, as booleans and as numbers
    # The last position's logits of each row, as they are and in fp32, before and after penalties.
    logits = rows * dims.vocabulary * (number + 8)
    return _memory_by_part(workload, device, cache, max(layer, logits))


def _memory_by_part(
    workload: Workload, device: Device, activations: float, transient: float
) -> dict[str, int]:
    """Return the bytes by part, with those that exist throughout."""
    dims, number = workload.dims, workload.weights.bytes_per_number
    whole = weight_bytes(dims, workload.weights)
    weights: float = whole
    if workload.shards > 1:  # this process's part, and two layers that are gathered at a time
        linear = dims.linear_parameters
        split = linear / workload.shards + 2 * linear / dims.layers
        weights = number * (dims.parameters - linear + min(linear, split))
    # Beside the fp32 tensors, a copy in the run's precision.
    adapter = (_LORA_BYTES + number) * workload.lora_parameters
    if workload.weights.quantize != "none":  # one matrix at a time, dequantized to be multiplied
        quantized = (linear for linear in dims.linears if linear.is_quantized)
        transient += number * max((each.inputs * each.outputs for each in quantized), default=0)
    # A sharded model is first loaded whole, before anything else needs memory.
    loading = max(0, whole - weights - adapter - activations - transient)
    parts = {
        "weights": weights,
        "adapter": adapter,
        "activations": activations,
        "transient": transient + loading,
        "process": process_bytes(device),
        "context": COST_MODELS[device.kind].context,
    }
    return {name: math.ceil(size) for name, size in parts.items()}


def chat_memory(dims: ModelDims, weights: WeightFormat, device: Device) -> int:
    """Return the bytes of a process that chats with this model; the margin covers the KV cache."""
    process = process_bytes(device) + COST_MODELS[device.kind].context
    return math.ceil((weight_bytes(dims, weights) + process) * (1 + MARGIN))


def process_bytes(device: Device) -> int:
    """Return the bytes of Python with its libraries, in the memory that the plan is for."""
    return COST_MODELS[device.kind].process if device.shares_memory else 0


def weight_bytes(dims: ModelDims, weights: WeightFormat) -> int:
    """Return the bytes of the frozen weights; most linear layers below the head are quantized."""
    rest = weights.bytes_per_number * (dims.parameters - dims.linear_parameters)
    return rest + sum(linear_bytes(group, weights) for group in dims.linears)


def linear_bytes(group: LinearGroup, weights: WeightFormat) -> int:
    """Return the bytes of a group of linear layers, with the scales of its quantized weights."""
    if weights.quantize == "int8" and group.is_quantized:  # and an fp32 scale for each row
        return group.parameters + 4 * group.count * group.outputs
    if weights.quantize == "nf4" and group.is_quantized:
        scale = 1 + 4 / _NF4_SUPER_BLOCK if weights.double_quantize else 4
        return math.ceil(group.parameters * (0.5 + scale / _NF4_BLOCK))
    return weights.bytes_per_number * group.parameters


def layer_bytes(workload: Workload, attention_outputs_kept: int) -> int:
    """Return the bytes that one layer keeps per token for backward; its linear layers keep none."""
    dims, lora = workload.dims, workload.lora
    hidden, inside = saved_tensors(dims, recompute=workload.weights.quantize != "int8")
    numbers = hidden * dims.hidden + inside * dims.intermediate
    # Query, key and value, and attention's results; then x Aᵀ of each adapter.
    numbers += dims.head_dim * ((1 + attention_outputs_kept) * dims.heads + 2 * dims.kv_heads)
    adapted = dims.adapted(lora.target_modules)
    numbers += lora.rank * sum(linear.count for linear in adapted) // dims.layers
    size = workload.weights.bytes_per_number * numbers
    if lora.dropout or lora.dora:  # each adapter's own input, in fp32
        size += 4 * (sum(linear.count * linear.inputs for linear in adapted) // dims.layers)
    return size


def head_bytes(workload: Workload, tokens: int, kind: str) -> int:
    """Return the bytes of the logits that exist at one time and of the head's input gradients.

    Logits become probabilities in fp32, those of a smaller arithmetic a few rows at a time.
    """
    dims, number = workload.dims, workload.weights.bytes_per_number
    rows, softmax_rows = head_chunk_rows(dims.vocabulary, number, kind)
    logits = number * min(tokens, rows) + (4 * min(tokens, softmax_rows) if number < 4 else 0)
    return logits * dims.vocabulary + tokens * dims.hidden * number


# --- time --------------------------------------------------------------------------------------


def flops_per_token(workload: Workload, checkpointing: bool) -> float:
    """Return the FLOPs per token of a training step.

    A frozen matrix is multiplied forward and backward by the input's gradient, an adapter's once
    more for its own; causal attention sees half the row, and its backward pass repeats the forward
    one. Recomputing adds a forward pass of the body.
    """
    extra = 1 if checkpointing else 0
    return _flops(workload, linear=2 + extra, lora=3 + extra, attention=3.5 + extra, head=2)


def _flops(
    workload: Workload, *, linear: float, lora: float, attention: float, head: float
) -> float:
    """Return the FLOPs per token where each part is multiplied that many times."""
    dims, lengths = workload.dims, workload.lengths
    attention_width = dims.layers * dims.heads * dims.head_dim
    frozen = dims.linear_parameters + dims.experts_used * dims.expert_parameters
    return (
        2 * frozen * linear
        + 2 * workload.lora_parameters * lora
        + 2 * attention_width * lengths.token_weighted_mean_length * attention
        + 2 * dims.embedding_parameters * lengths.supervised * head  # supervised tokens alone
    )


def predict_seconds(workload: Workload, kind: str, flops: float, checkpointing: bool) -> float:
    """Return the training time with the held-out evaluations; early stopping is not foreseen.

    `kind` is the device's, `flops` its rate for matrix products in FLOP/s. `max_minutes` bounds the
    training steps, as in a run.
    """
    heldout = workload.heldout_tokens
    rate = _rate(workload, kind, flops)
    tokens, steps = predict_tokens(workload, kind, flops, checkpointing)
    sizes = [round(workload.tokens_in_step)] * steps
    every = batches.choose_eval_every(workload.train, sizes, round(heldout), steps)
    evaluations = 1 + math.ceil(steps / every)  # before training, at intervals, at the end
    forward = _flops(workload, linear=1, lora=1, attention=1, head=1)
    seconds = tokens * flops_per_token(workload, checkpointing) / rate
    return seconds + evaluations * heldout * forward / rate


def predict_tokens(
    workload: Workload, kind: str, flops: float, checkpointing: bool
) -> tuple[float, int]:
    """Return the tokens to train on and the steps, as far as `max_minutes` allows."""
    tokens = tokens_to_train(workload)
    if workload.train.max_minutes:
        speed = _rate(workload, kind, flops) / flops_per_token(workload, checkpointing)
        tokens = min(tokens, 60 * workload.train.max_minutes * speed)
    return tokens, max(1, round(tokens / workload.tokens_in_step))


def _rate(workload: Workload, kind: str, flops: float) -> float:
    """Return the FLOP/s that training reaches."""
    costs, weights = COST_MODELS[kind], workload.weights
    return flops * costs.efficiency[weights.bytes_per_number] * costs.quantized[weights.quantize]


def predict_other_seconds(workload: Workload, kind: str, flops: float) -> float:
    """Return the time of loading before training and of the comparison after it; both are rough.

    Replies are generated for base and adapter, in batches: a decoding step of a batch costs as much
    as `STEP_COST` tokens of a prompt, and one token for each reply (`inference.generate`). The
    probes are answered by both.
    """
    rows = workload.heldout_rows
    batches_of_replies = math.ceil(rows / MAX_REPLY_BATCH)
    generated = workload.reply_tokens * (rows + STEP_COST * batches_of_replies)
    forward = _flops(workload, linear=1, lora=1, attention=1, head=1)
    tokens = 2 * (workload.heldout_tokens + generated + _PROBE_TOKENS)
    seconds = tokens * forward / (_rate(workload, kind, flops) * _REPLY_EFFICIENCY)
    return predict_load_seconds(workload) + seconds


def predict_load_seconds(workload: Workload) -> float:
    """Return the time from the start of the process until the model is loaded."""
    whole = weight_bytes(workload.dims, workload.weights)
    return _START_SECONDS + whole / _LOAD_BYTES_PER_SECOND


def tokens_to_train(workload: Workload) -> float:
    """Return the tokens of all epochs, or of `max_steps` where these are fewer."""
    tokens = workload.train.epochs * workload.lengths.tokens
    if workload.train.max_steps:
        tokens = min(tokens, workload.train.max_steps * workload.tokens_in_step)
    return tokens
