"""Choose how a training run uses a device: micro-batches, gradient checkpointing.

These change memory and speed, never the result: which rows form a step is the recipe's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.hardware.detect import Device
from jetson_ft.training import cost_model
from jetson_ft.training.cost_model import Workload


@dataclass(frozen=True)
class Plan:
    """Choices for one device; may differ between attempts of the same run."""

    micro_batch_tokens: int
    checkpointing: bool
    shards: int = 1  # processes that share the frozen layers; 1: each has all of them
    peak_memory_bytes: int = 0
    seconds: float | None = None  # of training, with the held-out measurements
    other_seconds: float | None = None  # of loading before it and the comparison after it
    parts: dict[str, int] = field(default_factory=dict)  # bytes of the peak; `predict_memory`

    def as_json(self) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        return asdict(self)


def choose_plan(workload: Workload, device: Device, flops: float) -> Plan:
    """Return the fastest plan that fits into the device's available memory.

    `flops` is its rate for matrix products in the recipe's arithmetic, FLOP/s.

    Raises:
        UserError: none fits; it names settings that would, each with its predicted peak.
    """
    if plan := best_plan(workload, device, flops):
        return plan
    smaller, limit_gb = suggestions(workload, device), workload.train.max_memory_gb
    sizes = {"free": device.memory_available / 2**30, "total": device.memory_total / 2**30}
    free = Message(_("{free:.2f} GiB are free"), sizes)
    if device.memory_limited:
        text = _("{free:.2f} GiB are free of the {total:.2f} GiB of this container or service")
        free = Message(text, sizes)
    fix = _("By prediction it would fit with {settings}.")
    if not smaller:
        fix = _("Free some memory, or choose a smaller model: no setting saves enough.")
    raise UserError(
        _("This job needs about {needed:.2f} GiB; its limit is {budget:.2f} GiB ({limit})."),
        device.board or device.name,
        fix,
        needed=least_memory(workload, device) / 2**30,
        budget=memory_budget(workload, device) / 2**30,
        limit=f"train.max_memory_gb: {limit_gb:g}" if limit_gb else free,
        settings="; ".join(f"`{text}` ({peak / 2**30:.2f} GiB)" for text, peak in smaller),
    )


def best_plan(workload: Workload, device: Device, flops: float) -> Plan | None:
    """Return the fastest plan that fits, or None; see `choose_plan`."""
    budget = memory_budget(workload, device)
    for plan in candidate_plans(workload, device):
        if plan.peak_memory_bytes <= budget:
            seconds = cost_model.predict_seconds(workload, device.kind, flops, plan.checkpointing)
            others = cost_model.predict_other_seconds(workload, device.kind, flops)
            return replace(plan, seconds=seconds, other_seconds=others)
    return None


def next_smaller_plan(workload: Workload, device: Device, plan: Plan) -> Plan | None:
    """Return the fastest plan that takes less memory than this one, or None."""
    for candidate in candidate_plans(workload, device):
        # With one row per micro-batch, only recomputation changes memory.
        is_different = plan.micro_batch_tokens > 0 or candidate.checkpointing > plan.checkpointing
        if is_different and candidate.peak_memory_bytes < plan.peak_memory_bytes:
            return candidate
    return None


def memory_limit_gb(plan: Plan) -> float:
    """Return the `max_memory_gb` under which this plan is the fastest that fits."""
    return math.ceil(plan.peak_memory_bytes / 10**6) / 1000


def min_memory_plan(plans: Sequence[Plan]) -> Plan:
    """Return the plan, among those of several processes, that takes the least memory."""
    return max(plans, key=lambda plan: (plan.checkpointing, -plan.micro_batch_tokens))


def memory_budget(workload: Workload, device: Device) -> float:
    """Return the bytes that the run may take: the recipe's limit, else most of what is free."""
    if workload.train.max_memory_gb:
        return workload.train.max_memory_gb * 10**9
    return device.memory_available * (1 - cost_model.MARGIN)


def candidate_plans(workload: Workload, device: Device) -> Iterator[Plan]:
    """Yield every possible plan, fastest first; the last one takes the least memory.

    Micro-batches are no larger than a step and no smaller than the longest row. The peak is that of
    training, or of the comparison with one reply at a time, if that takes more.
    """
    reply = cost_model.predict_reply_memory(workload, device, 1, workload.longest_prompt)
    step, longest = workload.train.tokens_per_step, workload.lengths.longest
    allowed = cost_model.COST_MODELS[device.kind].micro_batches[workload.weights.bytes_per_number]
    sizes = sorted({max(longest, min(size, step)) for size in allowed}, reverse=True)
    for checkpointing in (False, True):
        for size in sizes:
            training = cost_model.predict_memory(workload, device, size, checkpointing)
            parts = max(training, reply, key=lambda parts: sum(parts.values()))
            peak = sum(parts.values())
            yield Plan(size, checkpointing, workload.shards, peak, parts=parts)


def reply_batch_size(workload: Workload, device: Device, plan: Plan, width: int) -> int:
    """Return how many replies the comparison can generate at a time within the plan's peak.

    Args:
        width: tokens of the batch's longest prompt.
    """
    rows = 1
    while rows < cost_model.MAX_REPLY_BATCH:
        parts = cost_model.predict_reply_memory(workload, device, rows + 1, width)
        if sum(parts.values()) > plan.peak_memory_bytes:
            break
        rows += 1
    return rows


def least_memory(workload: Workload, device: Device) -> int:
    """Return the peak bytes of the plan that takes the least."""
    return min(plan.peak_memory_bytes for plan in candidate_plans(workload, device))


def suggestions(workload: Workload, device: Device, at_most: int = 4) -> list[tuple[str, int]]:
    """Return settings with which the workload would fit, each with its least peak in bytes."""
    limit, smaller = memory_budget(workload, device), _smaller_workloads(workload)
    peaks = [(settings, least_memory(changed, device)) for settings, changed in smaller]
    return [(settings, peak) for settings, peak in peaks if peak <= limit][:at_most]


def _smaller_workloads(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield settings and workload: smaller formats; shorter rows, a lower rank; these together."""
    weights = workload.weights
    formats = {}
    if weights.quantize == "none" and weights.precision == "fp32":
        formats["precision: bf16"] = replace(weights, precision="bf16")
    if weights.quantize == "none":
        formats["quantize: int8"] = replace(weights, quantize="int8")
    if weights.quantize != "nf4":
        formats["quantize: nf4"] = replace(weights, quantize="nf4")
    smaller = [(text, replace(workload, weights=value)) for text, value in formats.items()]
    yield from smaller
    for text, base in (("", workload), *smaller[-1:]):
        for length, rank in ((512, 8), (256, 4)):
            changes: list[tuple[str, str, Any]] = []
            if length < base.lengths.longest:
                changes += [(f"data.max_length: {length}", "lengths", base.lengths.cut(length))]
            if rank < base.lora.rank:
                lora = base.lora.model_copy(update={"rank": rank})
                changes += [(f"lora.rank: {rank}", "lora", lora)]
            for chosen in [*combinations(changes, 1), *combinations(changes, 2)]:
                settings = [*([text] if text else []), *(setting for setting, *_ in chosen)]
                yield ", ".join(settings), replace(base, **{key: value for _, key, value in chosen})
