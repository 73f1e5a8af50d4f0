"""Training that runs out of memory: its error message, and one more attempt with less memory.

`plan.json` keeps the limit of the second attempt (`memory_limit_gb`) for later ones. It is a limit
like `train.max_memory_gb`: the smaller plan changes how a step is computed and not its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import write_json
from jetson_ft.hardware.detect import Device
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.store import Run
from jetson_ft.training.distributed import DistributedContext
from jetson_ft.training.memory import is_out_of_memory

if TYPE_CHECKING:
    from jetson_ft.training.cost_model import Workload
    from jetson_ft.training.planner import Plan


class OutOfMemory(UserError):
    """Training needed more memory than there was."""

    def __init__(self, *texts: str | Message, retry: bool = False) -> None:
        super().__init__(*texts)
        self.retry = retry  # whether the supervisor should start one more attempt, with less


def limit_memory(run: Run, workload: Workload) -> Workload:
    """Return the workload with the memory limit of a run that shrinks (`train.on_oom`)."""
    limit = None
    with suppress(DamagedRun):  # on another rank than the one that sets it aside
        limit = run.plan().get("memory_limit_gb")
    if limit is None or workload.train.on_oom != "shrink":
        return workload
    limit = min(limit, workload.train.max_memory_gb or limit)
    train = workload.train.model_copy(update={"max_memory_gb": limit})
    return replace(workload, train=train)


@contextmanager
def explain_oom(
    run: Run, workload: Workload, plan: Plan, device: Device, dist: DistributedContext
) -> Iterator[None]:
    """Turn an error for lack of memory into an `OutOfMemory` that names the next smaller plan."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(run, workload, plan, device, dist) from error


def _out_of_memory(
    run: Run, workload: Workload, plan: Plan, device: Device, dist: DistributedContext
) -> OutOfMemory:
    from jetson_ft.training import planner

    stored = run.plan()  # empty if memory ran out before training began
    what = Message(_("Out of memory in training, with {plan}."), {"plan": _describe(plan)})
    smaller = planner.next_smaller_plan(replace(workload, shards=plan.shards), device, plan)
    if smaller is None:
        fix = _(
            "No plan takes less. Close other programs, or start a new run with a lower "
            "data.max_length or lora.rank, or with quantize: nf4."
        )
        return OutOfMemory(what, str(run.path), fix)
    limit = planner.memory_limit_gb(smaller)
    values = {"path": str(run.path), "limit": limit, "plan": _describe(smaller)}
    # Several processes get no second attempt, and one more attempt is enough.
    if workload.train.on_oom == "shrink" and dist.size == 1 and "memory_limit_gb" not in stored:
        write_json(run.path / "plan.json", {**stored, "memory_limit_gb": limit})
        fix = _("It starts again from the last checkpoint, once, with {plan}.")
        return OutOfMemory(what, str(run.path), Message(fix, values), retry=True)
    fix = _(
        "`jetson-ft train --resume {path} --set train.max_memory_gb={limit:g}` continues from the "
        "last checkpoint with {plan}; with `train.on_oom: shrink` a run does so by itself, once. "
        "Or close other programs, or start a new run with a lower data.max_length or lora.rank, "
        "or with quantize: nf4."
    )
    return OutOfMemory(what, str(run.path), Message(fix, values))


def _describe(plan: Plan) -> Message:
    size = Message(_("one row"))
    if plan.micro_batch_tokens:
        size = Message(_("{count:,} tokens"), {"count": plan.micro_batch_tokens})
    text = _("micro-batches of {size} and activations kept ({gib:.2f} GiB predicted)")
    if plan.checkpointing:
        text = _("micro-batches of {size} and activations recomputed ({gib:.2f} GiB predicted)")
    return Message(text, {"size": size, "gib": plan.peak_memory_bytes / 2**30})
