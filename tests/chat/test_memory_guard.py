"""Memory that a run still needs, by its plan and events, and the chat that must fit beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import step_event

from jetson_ft.chat import memory_guard
from jetson_ft.errors import UserError
from jetson_ft.events import WeightsLoaded
from jetson_ft.files import write_json
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.models.loading import WeightFormat
from jetson_ft.recipe import Recipe
from jetson_ft.runs import processes, store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.queue import QueueTicket
from jetson_ft.runs.store import Run

GB = 10**9
CPU = Device("cpu", "a processor", None, 2, 8 * GB, 4 * GB, False, False)
PARTS = {"process": GB // 2, "context": 0}


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Return a run that trains, without plan and events."""
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    run = store.create_run(Recipe(output_dir=str(tmp_path / "runs")), "beside")
    run.write_state("running")
    slot = QueueTicket(1.0).try_take(run.path)
    assert slot
    with slot:
        yield run


def write_plan(run: Run, peak: int, context: int = 0) -> None:
    parts = PARTS | {"context": context}
    write_json(run.path / "plan.json", {"peak_memory_bytes": peak, "parts": parts})


def emit_step(run: Run, memory: int, attempt: int = 1) -> None:
    EventLog(run, attempt).emit(step_event(1, memory=memory))


def remaining(run: Run) -> float:
    return memory_guard.remaining_memory(run, CPU)


def test_remaining_memory_shrinks_as_the_run_allocates(training: Run) -> None:
    assert remaining(training) == 4 * GB, "without a plan: half of the memory"
    write_plan(training, 3 * GB)
    assert remaining(training) == 2.5 * GB, "the process itself is allocated"
    EventLog(training, 1).emit(WeightsLoaded(bytes={"head": GB // 4, "layers": GB // 4}, fused={}))
    assert remaining(training) == 2 * GB
    emit_step(training, 2 * GB)
    assert remaining(training) == GB
    processes.write_distributed_config(training, processes.DistributedConfig(nproc_per_node=2))
    assert remaining(training) == 2 * GB, "each process needs as much"
    processes.write_distributed_config(training, processes.DistributedConfig())
    training.write_state("running", attempt=2)
    assert remaining(training) == 2.5 * GB, "events of the earlier attempt do not count"
    emit_step(training, 5 * GB, attempt=2)
    assert remaining(training) == 0


def test_gpu_step_memory_excludes_the_process(training: Run) -> None:
    write_plan(training, 3 * GB, context=GB // 4)
    emit_step(training, 2 * GB)
    assert remaining(training) == GB // 4


def test_chat_that_does_not_fit_beside_a_run_is_refused(
    training: Run, tiny_phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, weights = str(tiny_phi), WeightFormat("fp32")
    write_plan(training, 3 * GB)
    with pytest.raises(UserError, match=r"Beside it 0\.5 GiB are left; this model needs 0\.6 GiB"):
        memory_guard.require_memory(base, weights, replace(CPU, memory_available=int(3.05 * GB)))
    memory_guard.require_memory(base, weights, CPU)
    monkeypatch.setattr(
        detect, "detect_device", lambda: replace(CPU, memory_available=int(2.4 * GB))
    )
    assert memory_guard.is_memory_short()
    monkeypatch.setattr(detect, "detect_device", lambda: CPU)
    assert not memory_guard.is_memory_short()


def test_without_a_run_every_chat_is_allowed(
    tmp_path: Path, tiny_phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    full = replace(CPU, memory_available=0)
    memory_guard.require_memory("not/downloaded", WeightFormat("fp32"), full)
    monkeypatch.setattr(detect, "detect_device", lambda: pytest.fail("examined for nothing"))
    assert not memory_guard.is_memory_short()
