"""Training that runs out of memory: its error message, and one more attempt with less memory.

A lack of memory is raised in the worker, or the kernel kills the worker for it. Both take the next
smaller plan from `plan.json`, which keeps the limit of the second attempt (`memory_limit_gb`) for
later ones. It is a limit like `train.max_memory_gb`: the smaller plan changes how a step is
computed and not its result. The supervisor imports this module, so it imports no torch.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.events import (
    PHASES,
    Event,
    Failed,
    Generated,
    PhaseEnded,
    PhaseStarted,
    Step,
    Warned,
)
from jetson_ft.files import quoted, write_json
from jetson_ft.hardware import cgroup
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.event_log import emit_once
from jetson_ft.runs.event_reader import read_events
from jetson_ft.runs.exit_status import EXIT_FAILED, EXIT_RETRY
from jetson_ft.runs.processes import OUT_OF_MEMORY_FIX, read_distributed_config
from jetson_ft.runs.store import Run

if TYPE_CHECKING:
    from jetson_ft.hardware.detect import Device
    from jetson_ft.training.cost_model import Workload
    from jetson_ft.training.planner import Plan

_KILL_SECONDS = 60.0  # a large process takes so long to end after the kernel has counted its kill
_SHORT_SHARE = 0.02  # of all memory: a kill with less than this available is for lack of memory
_TAIL_BYTES = 1 << 18  # of the events, to find what the run was doing
# Phases, by their names in events, whose memory a smaller plan lowers.
_PLANNED_PHASES = ("sharding", "training", "comparison")
_DESCRIBED = {"smaller", "micro_batch_tokens", "checkpointing", "peak_memory_bytes"}  # of a plan


class OutOfMemory(UserError):
    """Training needed more memory than there was.

    Args:
        retry: whether the supervisor should start one more attempt, with less.
        max_memory_gb: `train.max_memory_gb` with which a person can continue; None: there is none.
    """

    def __init__(
        self, *texts: str | Message, retry: bool = False, max_memory_gb: float | None = None
    ) -> None:
        super().__init__(*texts)
        self.retry, self.max_memory_gb = retry, max_memory_gb

    def as_json(self) -> dict[str, Any]:
        """Return the fields of `Failed`."""
        return {**super().as_json(), "max_memory_gb": self.max_memory_gb}


class KillWatch:
    """Recognises a kill by the kernel for lack of memory; `update` is called a few times a second.

    The counters of the control groups and of the machine show it. Memory that was short just before
    is a sign too: daemons such as earlyoom kill without a counter.

    Args:
        root: the root of the file system with /proc and /sys.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._kills = cgroup.oom_kills(root)
        self._last_sign = -_KILL_SECONDS
        self.update()

    def update(self) -> None:
        """Read the counters and the available memory."""
        now, kills = time.monotonic(), cgroup.oom_kills(self._root)
        memory, limit = psutil.virtual_memory(), cgroup.memory_limit(self._root)
        is_short = (
            memory.available < _SHORT_SHARE * memory.total
            or limit.available < _SHORT_SHARE * limit.limit
        )
        if kills > self._kills or is_short:
            self._last_sign = now
        self._kills = kills

    def saw_kill(self) -> bool:
        """Return whether a process that was killed just now was most likely killed for memory."""
        self.update()
        return time.monotonic() - self._last_sign < _KILL_SECONDS


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


def plan_as_json(workload: Workload, plan: Plan, device: Device) -> dict[str, Any]:
    """Return the content of `plan.json`: the plan, and the next `smaller` one or None."""
    from jetson_ft.training import planner

    smaller = planner.next_smaller_plan(replace(workload, shards=plan.shards), device, plan)
    content = plan.as_json()
    content["smaller"] = smaller and {
        "micro_batch_tokens": smaller.micro_batch_tokens,
        "checkpointing": smaller.checkpointing,
        "peak_memory_bytes": smaller.peak_memory_bytes,
        "memory_limit_gb": planner.memory_limit_gb(smaller),
    }
    return content


def record_kill(run: Run) -> int:
    """Record that the kernel killed the worker; return the exit code that the worker would have."""
    error = explain_oom(run, is_killed=True)
    if error.retry:
        emit_once(run, Warned.of_message(joined([error.what, error.fix], " ")))
        return EXIT_RETRY
    emit_once(run, Failed(**error.as_json()))
    return EXIT_FAILED


def explain_oom(run: Run, is_killed: bool = False) -> OutOfMemory:
    """Return the error for a lack of memory, with settings that take less.

    If the run is to be tried again, also write the limit of that attempt into `plan.json`.

    Args:
        is_killed: the kernel killed a process; else a process raised an error.
    """
    phase, step = _last_phase(run)
    values = {"path": str(run.path), "phase": Message(PHASES.get(phase, phase)), "step": step}
    text = _("{path} ({phase})") if step is None else _("{path} ({phase}, after step {step})")
    where = Message(text, values)
    plan: dict[str, Any] = {}
    with suppress(UserError):  # a damaged one
        plan = run.plan()
    if phase not in _PLANNED_PHASES or not plan.keys() >= _DESCRIBED:
        what = _("Out of memory.")
        if is_killed:
            what = _("Out of memory: the kernel ended the process.")
        return OutOfMemory(what, where, OUT_OF_MEMORY_FIX)
    what = _("Out of memory in training, with {plan}.")
    if is_killed:
        what = _("Out of memory in training, with {plan}: the kernel ended the process.")
    described = Message(what, {"plan": _describe(plan)})
    smaller = plan["smaller"]
    if smaller is None:
        fix = _(
            "No plan takes less. Close other programs, or start a new run with a lower "
            "data.max_length or lora.rank, or with quantize: nf4."
        )
        return OutOfMemory(described, where, fix)
    limit = smaller["memory_limit_gb"]
    values = {"path": quoted(str(run.path)), "limit": limit, "plan": _describe(smaller)}
    # Several processes get no second attempt, and one more attempt is enough.
    with suppress(UserError):  # the disk is full, or a file is damaged
        is_alone = not read_distributed_config(run).needs_launcher
        if run.recipe().train.on_oom == "shrink" and is_alone and "memory_limit_gb" not in plan:
            write_json(run.path / "plan.json", {**plan, "memory_limit_gb": limit})
            fix = _("It starts again from the last checkpoint, once, with {plan}.")
            return OutOfMemory(described, where, Message(fix, values), retry=True)
    fix = _(
        "`jetson-ft train --resume {path} --set train.max_memory_gb={limit:g}` continues from the "
        "last checkpoint with {plan}; with `train.on_oom: shrink` a run does so by itself, once. "
        "Or close other programs, or start a new run with a lower data.max_length or lora.rank, "
        "or with quantize: nf4."
    )
    return OutOfMemory(described, where, Message(fix, values), max_memory_gb=limit)


def smaller_plan_settings(run: Run) -> list[str]:
    """Return the settings with which a run that ran out of memory continues with less.

    Empty where its last attempt failed for another reason, or no plan takes less.
    """
    with suppress(DamagedRun):
        failure = run.last_event(Failed)
        if failure and failure.max_memory_gb is not None:
            return [f"train.max_memory_gb={failure.max_memory_gb:g}"]
    return []


def _last_phase(run: Run) -> tuple[str, int | None]:
    """Return the phase that the current attempt is in, and its last step in training."""
    attempt = run.state_or_derived().attempt
    events: list[Event] = []
    with suppress(DamagedRun):
        size = run.events_file.stat().st_size if run.events_file.exists() else 0
        events, _offset = read_events(run.events_file, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
    for event in reversed(events):
        if event.attempt != attempt:
            break
        match event:
            case Step():
                return "training", event.step
            case Generated():
                return "comparison", None
            case PhaseStarted():
                return event.name, None
            case PhaseEnded(name="model"):  # sharding and the trial of packing follow
                return "training", None
    return "libraries", None


def _describe(plan: dict[str, Any]) -> Message:
    size = Message(_("one row"))
    if plan["micro_batch_tokens"]:
        size = Message(_("{count:,} tokens"), {"count": plan["micro_batch_tokens"]})
    text = _("micro-batches of {size} and activations kept ({gib:.2f} GiB predicted)")
    if plan["checkpointing"]:
        text = _("micro-batches of {size} and activations recomputed ({gib:.2f} GiB predicted)")
    return Message(text, {"size": size, "gib": plan["peak_memory_bytes"] / 2**30})
