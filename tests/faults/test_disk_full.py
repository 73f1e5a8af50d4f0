"""A disk that is full in any moment of a run: what is reported, kept, removed and resumed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from small_disk import SmallDisk
from workbench import Workbench

from jetson_ft.events import Exited, Failed
from jetson_ft.runs import exit_status
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint

KIB = 1024
# Where the disk becomes full, and the KiB that are left then.
MOMENTS = [
    ("", 0), ("", 20), ("", 60), ("plan", 0), ("step-2", 0), ("checkpoint-4", 24),
    ("best", 24), ("phase-report", 4), ("phase-report", 12),
]  # fmt: skip
PLACES = ["data", "weights", "plan", "step-1", "eval-4", "checkpoint-4", "phase-comparison"]
SAMPLE = [
    *((place, leave) for place, leave in itertools.product(PLACES, (0, 4, 16, 28))),
    *(("", leave) for leave in range(4, 60, 8)), ("best", 0), ("best", 12), ("phase-report", 0),
]  # fmt: skip


def last(run: Run, kind: type[Any]) -> Any:
    return [event for event in run.events() if isinstance(event, kind)][-1]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def weights(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def check_run_on_full_disk(
    place: str, leave: int, disk: SmallDisk, workbench: Workbench, undisturbed: Run
) -> None:
    """Fill the disk at an event, resume with an empty one."""
    bench = Workbench(workbench.model, workbench.rows, disk.path / "runs")
    cache = {"JETSON_FT_CACHE": str(disk.path / "cache")}
    filling = {"FILL_AT": place, "FILL": str(disk.path), "FILL_LEAVE": str(leave * KIB)}
    run = bench.run("short")
    run.reserve_space()
    if not place:
        disk.fill(leave * KIB)
    code = bench.work(run, **cache, **filling)
    log = (run.path / "log.txt").read_text()
    assert code == exit_status.EXIT_DISK_FULL, log
    failure = last(run, Failed)
    assert "full" in failure.what and "Free some space" in failure.fix and failure.where
    assert last(run, Exited).code == code
    status = exit_status.state_for_exit_code(run, code)
    assert (status.state, status.resumable) == ("failed", True)
    run.write_state(*status)
    assert not hidden(disk.path), "half-written files are left"
    for folder in checkpoint.list_checkpoints(run.checkpoints):
        assert checkpoint.find_fault(folder) is None
    disk.empty()
    assert bench.work(run, **cache, FILL_AT="") == 0, (run.path / "log.txt").read_text()
    assert weights(run) == weights(undisturbed)
    assert not hidden(disk.path)


@pytest.mark.promise(3)
@pytest.mark.promise(60)
@pytest.mark.parametrize(("place", "leave"), MOMENTS)
def test_run_on_a_full_disk_says_so_and_is_resumed_with_the_same_result(
    place: str, leave: int, small_disk: SmallDisk, workbench: Workbench, finished: Run
) -> None:
    check_run_on_full_disk(place, leave, small_disk, workbench, finished)


@pytest.mark.promise(3)
@pytest.mark.promise(60)
@pytest.mark.slow(minutes=0.5)
@pytest.mark.parametrize(("place", "leave"), SAMPLE)
def test_run_on_a_full_disk_in_more_moments(
    place: str, leave: int, small_disk: SmallDisk, workbench: Workbench, finished: Run
) -> None:
    check_run_on_full_disk(place, leave, small_disk, workbench, finished)
