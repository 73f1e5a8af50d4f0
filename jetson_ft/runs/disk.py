"""Disk space of a run: what it needs, and what killed processes left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jetson_ft.errors import Message, _
from jetson_ft.files import cache_dir, remove_abandoned, require_space
from jetson_ft.runs.store import Run

if TYPE_CHECKING:
    from jetson_ft.training.cost_model import Workload

_WEIGHT_BYTES = 4  # of an adapter's weight in a file, fp32
_CHECKPOINT_BYTES = 12  # of the same with AdamW's two moments
_CACHES = (("data",), ("data", "hashes"), ("tokens",))


def checkpoint_space(workload: Workload) -> int:
    """Return the bytes of the tensors in a run's checkpoints and adapter.

    These are the newest checkpoints, the best one, and one that is being written.
    """
    count = workload.train.save_total_limit + 2
    weights = workload.lora_parameters
    return weights * (count * _CHECKPOINT_BYTES + _WEIGHT_BYTES)


def require_checkpoint_space(run: Run, workload: Workload) -> None:
    """Raise `DiskFull` if the disk has too little space for the run's checkpoints and adapter."""
    written = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    needed = checkpoint_space(workload) - written
    require_space(run.path, needed, Message(_("this run, for its checkpoints and adapter,")))


def remove_abandoned_files(run: Run) -> None:
    """Remove half-written files that killed processes left in the run's folder and the caches."""
    for folder in (run.path, *(cache_dir(*parts) for parts in _CACHES)):
        remove_abandoned(folder)
