"""Memory checks for a chat beside a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jetson_ft.errors import UserError, _
from jetson_ft.events import Step, WeightsLoaded
from jetson_ft.runs import monitor, processes, queue
from jetson_ft.runs.store import Run

if TYPE_CHECKING:
    from jetson_ft.hardware.detect import Device
    from jetson_ft.models.loading import WeightFormat

_UNPLANNED_SHARE = 0.5  # of all memory, for a run that has no plan yet


def require_memory(model: str, weights: WeightFormat, device: Device) -> None:
    """Raise `UserError` if a chat's model doesn't fit beside the run that trains, by its plan."""
    if queue.running_run() is None:
        return
    from jetson_ft.models import catalog, files
    from jetson_ft.training import cost_model

    dims = catalog.model_dims(files.resolve_model(model, weights=False))
    require_free(cost_model.chat_memory(dims, weights, device), device)


def require_free(needed: float, device: Device) -> None:
    """Raise `UserError` if a model of `needed` bytes doesn't fit beside the run that trains."""
    folder = queue.running_run()
    if folder is None:
        return
    free = device.memory_available - remaining_memory(Run(folder), device)
    if needed > free:
        raise UserError(
            _("Busy: a run is training. Beside it {free:.1f} GiB are left; this model needs "
              "{needed:.1f} GiB."),
            str(folder),
            _("Wait for its end, or stop it; it can be resumed."),
            free=max(0, free) / 2**30, needed=needed / 2**30,
        )  # fmt: skip


def is_memory_short(read_device: Callable[[], Device] | None = None) -> bool:
    """Return whether a run is training that needs more memory than is free now.

    Args:
        read_device: returns this machine; None: `detect.detect_device`, which imports torch.
    """
    folder = queue.running_run()
    if folder is None:  # the usual case: examine no device
        return False
    from jetson_ft.hardware import detect

    device = (read_device or detect.detect_device)()
    return device.memory_available < remaining_memory(Run(folder), device)


def remaining_memory(run: Run, device: Device) -> float:
    """Return the bytes that the run will allocate by its plan and hasn't allocated yet.

    For a run without a plan this is half of the machine's memory. Processes that share one memory
    are added up; a GPU with its own memory holds one process.
    """
    try:
        plan, attempt = run.plan(), run.state().attempt
        progress = monitor.read_progress(run)
        count = processes.read_distributed_config(run).nproc_per_node
    except UserError:
        plan = {}
    if not plan.get("peak_memory_bytes"):
        return _UNPLANNED_SHARE * device.memory_total
    step, weights = progress.last(Step), progress.last(WeightsLoaded)
    # A step's `memory` is all of a process on a CPU. On a GPU it is what torch allocated, without
    # the process itself and the driver's context.
    process, context = (plan.get("parts", {}).get(part, 0) for part in ("process", "context"))
    allocated: float = process + context
    if step and step.attempt == attempt:
        allocated = step.memory + (allocated if context else 0)
    elif weights and weights.attempt == attempt:
        allocated += sum(weights.bytes.values())
    count = count if device.shares_memory else 1
    return count * max(0.0, float(plan["peak_memory_bytes"]) - allocated)
