"""Whether something else has room in memory beside the run that has the machine's slot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError
from jetson_ft.paths import read_json
from jetson_ft.runs import live, processes, slot
from jetson_ft.runs.rundir import Run

if TYPE_CHECKING:
    from jetson_ft.device.probe import Device
    from jetson_ft.models.load import Weights

_UNKNOWN = 0.5  # of the memory, for a run that has no plan yet


def require_room(model: str, weights: Weights, device: Device) -> None:
    """For a chat with that model, before it is loaded; its config is read if a run has the slot.

    Raises:
        UserError: a run is training, and by its plan the two don't fit together.
    """
    folder = slot.holder()
    if folder is None:
        return
    from jetson_ft.models import resolve, shapes
    from jetson_ft.training import planner

    shape = shapes.of(resolve.resolve(model, weights=False))
    needed = planner.chat_bytes(shape, weights, device)
    left = device.memory_available - still_to_come(Run(folder), device)
    if needed > left:
        raise UserError(
            f"Busy: a run is training. Beside it {max(0, left) / 2**30:.1f} GiB are left; this "
            f"model needs {needed / 2**30:.1f} GiB.",
            fix="Wait for its end, or stop it; it can be resumed.",
        )


def is_scarce(device: Device) -> bool:
    """Whether the run that has the slot, if there is one, needs more than what is free."""
    folder = slot.holder()
    if folder is None:
        return False
    return device.memory_available < still_to_come(Run(folder), device)


def still_to_come(run: Run, device: Device) -> float:
    """Bytes that the run will take by its plan, and hasn't taken yet.

    Of one that has no plan yet it is half of the memory. All its processes on this machine
    count, but on a GPU with a memory of its own, where each has its own.
    """
    try:
        plan, attempt = read_json(run.path / "plan.json"), run.state().attempt
    except UserError:
        return _UNKNOWN * device.memory_total
    if not plan.get("peak_memory_bytes"):
        return _UNKNOWN * device.memory_total
    told = live.newest(run).last
    now = {kind: event for kind, event in told.items() if event["attempt"] == attempt}
    count = processes.of(run).nproc_per_node if device.shares_memory else 1
    return count * max(0.0, float(plan["peak_memory_bytes"]) - _taken(plan["parts"], now))


def _taken(parts: dict[str, int], told: dict[str, dict[str, Any]]) -> int:
    """Bytes that a process has, by the newest events of its attempt.

    On a CPU a step tells the whole process's; on a GPU what torch allocated, to which the
    process itself and the driver's context come.
    """
    loaded = parts["process"] + parts["context"]
    if "step" in told:
        return int(told["step"]["memory"]) + (loaded if parts["context"] else 0)
    return loaded + (sum(told["weights"]["bytes"].values()) if "weights" in told else 0)
