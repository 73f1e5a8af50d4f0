"""Whether something else has room in memory beside the run that has the machine's slot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError
from jetson_ft.paths import read_json
from jetson_ft.runs import live, slot
from jetson_ft.runs.rundir import Run

if TYPE_CHECKING:
    from jetson_ft.device.probe import Device
    from jetson_ft.models.load import Weights
    from jetson_ft.models.resolve import Base

_UNKNOWN = 0.5  # of the memory, for a run that has no plan yet


def require_room(base: Base, weights: Weights, device: Device) -> None:
    """For a chat with that model, before it is loaded.

    Raises:
        UserError: a run is training, and by its plan the two don't fit together.
    """
    folder = slot.holder()
    if folder is None:
        return
    from jetson_ft.models import shapes
    from jetson_ft.training import planner

    needed = planner.chat_bytes(shapes.of(base), weights, device)
    left = device.memory_available - still_to_come(folder, device.memory_total)
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
    return device.memory_available < still_to_come(folder, device.memory_total)


def still_to_come(folder: Path, total: int) -> float:
    """Bytes that the run of this folder will take by its plan, and hasn't taken yet.

    Until its first step counts as if nothing were taken; without a plan, as half of `total`.
    """
    run = Run(folder)
    try:
        plan, attempt = read_json(run.path / "plan.json"), run.state().attempt
    except UserError:
        return _UNKNOWN * total
    steps = live.newest(run).last.get("step", {})
    if not plan.get("peak_memory_bytes"):
        return _UNKNOWN * total
    taken = _taken(plan, steps) if steps.get("attempt") == attempt else 0
    return max(0.0, float(plan["peak_memory_bytes"]) - taken)


def _taken(plan: dict[str, Any], step: dict[str, Any]) -> int:
    """On a GPU a step tells what torch allocated; the process and its context come to that."""
    context = plan["parts"]["context"]
    return int(step["memory"]) + (context + plan["parts"]["process"] if context else 0)
