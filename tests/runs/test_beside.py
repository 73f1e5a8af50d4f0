"""Who has room beside a run, by its plan and what it told of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError
from jetson_ft.models.load import Weights
from jetson_ft.paths import write_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs import beside, processes, rundir
from jetson_ft.runs.rundir import EventLog, Run
from jetson_ft.runs.slot import Slot

GB = 10**9
CPU = Device("cpu", "a processor", None, 2, 8 * GB, 4 * GB, False, False)
PARTS = {"process": GB // 2, "context": 0}


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run that has the slot, with nothing told yet."""
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    run = rundir.create(Recipe(output=str(tmp_path / "runs")), "beside")
    run.write_state("running")
    held = Slot(1.0).try_take(run.path)
    assert held
    with held:
        yield run


def plan(run: Run, peak: int, context: int = 0) -> None:
    parts = PARTS | {"context": context}
    write_json(run.path / "plan.json", {"peak_memory_bytes": peak, "parts": parts})


def step(run: Run, memory: int, attempt: int = 1) -> None:
    EventLog(run, attempt).emit("step", step=1, memory=memory)


def to_come(run: Run) -> float:
    return beside.still_to_come(run, CPU)


def test_what_a_run_will_still_take_shrinks_as_it_takes_it(training: Run) -> None:
    assert to_come(training) == 4 * GB, "half of the memory, as long as nothing is planned"
    plan(training, 3 * GB)
    assert to_come(training) == 2.5 * GB, "the process itself is there"
    EventLog(training, 1).emit("weights", bytes={"head": GB // 4, "layers": GB // 4})
    assert to_come(training) == 2 * GB
    step(training, 2 * GB)
    assert to_come(training) == GB
    processes.store(training, processes.Processes(nproc_per_node=2))
    assert to_come(training) == 2 * GB, "each of them takes as much"
    processes.store(training, processes.Processes())
    training.write_state("running", attempt=2)
    assert to_come(training) == 2.5 * GB, "a new attempt begins with nothing"
    step(training, 5 * GB, attempt=2)
    assert to_come(training) == 0


def test_a_gpus_step_is_without_its_process(training: Run) -> None:
    plan(training, 3 * GB, context=GB // 4)
    step(training, 2 * GB)
    assert to_come(training) == GB // 4


def test_a_chat_fits_by_plan_or_is_told_busy(training: Run, tiny_phi: Path) -> None:
    base, weights = str(tiny_phi), Weights("fp32")
    plan(training, 3 * GB)
    with pytest.raises(UserError, match=r"Beside it 0\.5 GiB are left; this model needs 0\.6 GiB"):
        beside.require_room(base, weights, replace(CPU, memory_available=int(3.05 * GB)))
    beside.require_room(base, weights, CPU)
    assert beside.is_scarce(replace(CPU, memory_available=int(2.4 * GB)))
    assert not beside.is_scarce(CPU)


def test_without_a_run_there_is_always_room(
    tmp_path: Path, tiny_phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    full = replace(CPU, memory_available=0)
    beside.require_room("not/fetched", Weights("fp32"), full)
    assert not beside.is_scarce(full)
