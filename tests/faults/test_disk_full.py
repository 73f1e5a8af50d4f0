"""A disk that is full in any moment of a run: what is reported, kept, removed and resumed."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fake_hub import BIG, CUT, FETCH, FakeHub, run_client, start, wait_for_part
from small_disk import SmallDisk
from workbench import Workbench

from jetson_ft.events import CheckpointSaved, Exited, Failed, Step
from jetson_ft.files import DiskFull, staged, staging_folder
from jetson_ft.models import embedded
from jetson_ft.runs import exit_status, manager, store
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint

pytestmark = pytest.mark.any_packages

KIB = 1024
# Where the disk becomes full, and the KiB that are left then.
MOMENTS = [
    ("", 0), ("", 40), ("step-2", 0), ("checkpoint-4", 24), ("best", 24), ("phase-report", 12),
]  # fmt: skip
PLACES = ["data", "weights", "plan", "step-1", "eval-4", "checkpoint-4", "phase-comparison"]
MORE_MOMENTS = [
    *((place, leave) for place, leave in itertools.product(PLACES, (0, 4, 12, 16))),
    *(("", leave) for leave in range(4, 60, 8)), ("best", 0), ("best", 12), ("phase-report", 0),
]  # fmt: skip


def last(run: Run, kind: type[Any]) -> Any:
    return [event for event in run.events() if isinstance(event, kind)][-1]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def weights(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.promise(3)
@pytest.mark.promise(60)
@pytest.mark.parametrize(
    ("place", "leave"),
    [*MOMENTS, *(pytest.param(*m, marks=pytest.mark.slow(minutes=0.05)) for m in MORE_MOMENTS)],
)
def test_run_on_a_full_disk_says_so_and_is_resumed_with_the_same_result(
    place: str, leave: int, small_disk: SmallDisk, workbench: Workbench, finished: Run
) -> None:
    """The disk becomes full at an event; the run is resumed with an empty one."""
    bench = Workbench(workbench.model, workbench.rows, small_disk.path / "runs")
    cache = {"JETSON_FT_CACHE": str(small_disk.path / "cache")}
    filling = {"FILL_AT": place, "FILL": str(small_disk.path), "FILL_LEAVE": str(leave * KIB)}
    run = bench.run("short")
    run.reserve_space()
    if not place:
        small_disk.fill(leave * KIB)
    code = bench.work(run, **cache, **filling)
    log = (run.path / "log.txt").read_text()
    assert code == exit_status.EXIT_DISK_FULL, log
    failure = last(run, Failed)
    assert "disk is full" in failure.what and "Free some space" in failure.fix and failure.where
    assert last(run, Exited).code == code
    status = exit_status.state_for_exit_code(run, code)
    assert (status.state, status.resumable) == ("failed", True)
    run.write_state(*status)
    assert not hidden(small_disk.path), "half-written files are left"
    for folder in checkpoint.list_checkpoints(run.checkpoints):
        assert checkpoint.find_fault(folder) is None
    small_disk.empty()
    assert bench.work(run, **cache, FILL_AT="") == 0, (run.path / "log.txt").read_text()
    assert weights(run) == weights(finished)
    assert not hidden(small_disk.path)


@pytest.mark.promise(60)
def test_training_goes_on_without_its_log(
    small_disk: SmallDisk, workbench: Workbench, finished: Run
) -> None:
    """The disk is full for some steps only: no event is lost."""
    bench = Workbench(workbench.model, workbench.rows, small_disk.path / "runs")
    run = bench.run("short")
    # The next steps need another block of the disk.
    before, _step, _rest = (
        (finished.path / "events.jsonl").read_bytes().partition(b'"kind": "step"')
    )
    run.events_file.write_bytes(b"x" * (-(len(before) + 600) % 4096) + b"\n")
    filling = {"FILL": str(small_disk.path), "FILL_LEAVE": "0"}
    code = bench.work(run, FILL_AT="step-1", EMPTY_AT="step-4", **filling)
    assert code == 0, (run.path / "log.txt").read_text()
    for kind in (Step, CheckpointSaved):
        steps = [
            [event.step for event in r.events() if isinstance(event, kind)] for r in (run, finished)
        ]
        assert steps[0] == steps[1]
    times = [event.t for event in run.events()]
    assert times == sorted(times)


@pytest.mark.promise(60)
def test_full_disk_is_recognised_in_errors_of_libraries(workbench: Workbench) -> None:
    run = workbench.run("library")
    fault = "I/O error: No space left on device (os error 28)"
    code = workbench.work(run, FAULT_AT="weights", FAULT=fault)
    assert code == exit_status.EXIT_DISK_FULL and "disk is full" in last(run, Failed).what


# --- the processes beside the worker -------------------------------------------------------------


@pytest.fixture
def short_runs(light_runs: Any, small_disk: SmallDisk) -> Any:
    """Return light runs on the small disk; the queue is on another one."""
    light_runs.root = small_disk.path / "runs"
    make = light_runs.recipe

    def small_recipe() -> Any:
        recipe = make()
        recipe.lora.rank = 1  # its checkpoints need 16 MB
        return recipe

    light_runs.recipe = small_recipe
    return light_runs


@pytest.mark.promise(60)
def test_supervisor_outlives_a_full_disk_and_records_the_end(
    short_runs: Any, small_disk: SmallDisk
) -> None:
    run = short_runs.launch("endless")
    worker, supervisor = short_runs.worker(run), short_runs.supervisor(run)
    small_disk.fill()
    os.kill(worker, signal.SIGSTOP)
    try:
        run.request_stop()
        time.sleep(0.6)  # the supervisor tries to write that the run is stopping
        assert supervisor.is_running() and supervisor.status() != "zombie"
    finally:
        os.kill(worker, signal.SIGCONT)
    assert short_runs.wait(run, *store.ENDED_STATES) == "stopped"
    assert not (run.path / "reserve").exists() and not hidden(run.path)


@pytest.mark.promise(60)
@pytest.mark.parametrize("process", ["worker", "supervisor"])
def test_shutdown_on_a_full_disk_is_no_stop_by_a_person(
    process: str, short_runs: Any, small_disk: SmallDisk
) -> None:
    run = short_runs.launch("endless")
    worker, supervisor = short_runs.worker(run), short_runs.supervisor(run)
    small_disk.fill()
    os.kill(worker if process == "worker" else supervisor.pid, signal.SIGTERM)
    assert short_runs.wait(run, *store.ENDED_STATES) == "stopped"
    assert "shutdown" in run.state().reason and run.state().interrupted
    assert not run.stop_requested()


@pytest.mark.promise(60)
@pytest.mark.parametrize("reserve", [True, False])
def test_state_is_true_after_both_processes_died_on_a_full_disk(
    reserve: bool, short_runs: Any, small_disk: SmallDisk
) -> None:
    run = short_runs.launch("endless")
    worker = short_runs.worker(run)
    small_disk.fill()
    short_runs.kill_supervisor(run)
    os.kill(worker, signal.SIGKILL)
    short_runs.until(lambda: not run.is_locked("worker"))
    if not reserve:
        (run.path / "reserve").unlink()
        small_disk.empty()
        small_disk.fill()
    assert manager.reconcile_state(run) == "failed"
    assert run.state().state == "failed" or not reserve
    small_disk.empty()
    assert manager.reconcile_state(run) == "failed" == run.state().state
    assert run.state().resumable


@pytest.mark.promise(60)
def test_full_disk_under_the_queue_is_the_runs_reason(
    light_runs: Any, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(small_disk.path / "cache"))
    small_disk.fill()
    run = light_runs.launch("endless")
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    assert "disk is full" in run.state().reason and run.state().resumable
    small_disk.empty()
    manager.resume(run)
    light_runs.worker(run)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"


@pytest.mark.promise(60)
def test_resume_on_a_full_disk_is_refused_and_changes_nothing(
    short_runs: Any, small_disk: SmallDisk
) -> None:
    run = short_runs.launch("refused")
    short_runs.wait(run, *store.ENDED_STATES)
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    small_disk.fill(8 * KIB)
    with pytest.raises(DiskFull, match="disk is full"):
        manager.resume(run, ["train.epochs=9"])
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


@pytest.mark.promise(60)
def test_run_that_needs_more_than_there_is_is_refused_at_once(
    short_runs: Any, small_disk: SmallDisk
) -> None:
    small_disk.path.joinpath("runs").mkdir()
    recipe = short_runs.recipe()
    recipe.lora.rank = 64
    with pytest.raises(DiskFull, match=r"33\.6 MB are free, .* needs 1,\d{3}\.\d MB"):
        manager.launch(recipe, "large")
    assert not small_disk.files()


# --- downloads -----------------------------------------------------------------------------------


@pytest.mark.promise(60)
def test_download_that_does_not_fit_is_refused_at_once(
    fake_hub: FakeHub, small_disk: SmallDisk
) -> None:
    small_disk.fill(500_000)
    (answer,) = run_client(fake_hub.address, small_disk.path / "hf", FETCH)
    assert re.search(r"0\.5 MB are free, the download of o/n needs 1\.0 MB", answer["what"])
    assert not small_disk.files() and not fake_hub.requests_for("model.safetensors")


@pytest.mark.promise(60)
def test_download_that_fills_the_disk_resumes_once_there_is_room(
    fake_hub: FakeHub, small_disk: SmallDisk
) -> None:
    home = small_disk.path / "hf"
    fake_hub.stall = True
    with start(fake_hub.address, home, FETCH) as client:
        assert fake_hub.stalled.wait(20)
        wait_for_part(home, CUT - (1 << 17))
        time.sleep(0.1)
        small_disk.fill()
        fake_hub.released.set()  # the rest follows
        out, errors = client.communicate(timeout=20)
    (answer,) = json.loads(out)
    assert "disk is full" in answer["what"] and "Free some space" in answer["fix"], errors
    small_disk.empty()
    (fetched,) = run_client(fake_hub.address, home, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert "Range" in fake_hub.requests_for("model.safetensors")[-1]


@pytest.mark.promise(60)
def test_bundled_model_is_converted_only_where_it_fits(
    small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(small_disk.path))
    monkeypatch.delenv("JETSON_FT_EMBEDDED", raising=False)
    with pytest.raises(DiskFull, match=r"the bundled model needs 273\.0 MB"):
        embedded.embedded_folder()
    assert small_disk.files() == [f".{embedded.NAME}-v1.lock"]


# --- what is left behind -------------------------------------------------------------------------


@pytest.mark.promise(60)
def test_files_of_killed_processes_are_removed_at_the_next_start(
    workbench: Workbench, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run = workbench.run("sweeping")
    places = [run.path / "adapter", cache / "tokens/1.arrow", cache / "data/hashes/2"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    with staged(places[1]), staging_folder(places[2]):
        living = list(cache.rglob(".*"))
        for place in places:
            (folder := place.with_name(f".{place.name}.dead.tmp")).mkdir()
            (folder / "part").touch()
            (file := place.with_name(f".{place.name}.killed.tmp")).touch()
            for path in (folder, file):
                os.utime(path, (1, 1))
        for path in living:
            os.utime(path, (1, 1))
        workbench.work(run, kill_at="data", JETSON_FT_CACHE=str(cache))
        assert sorted(hidden(cache)) == sorted(path.name for path in living)
        assert not hidden(run.path)


# --- without the rights to mount a disk ----------------------------------------------------------


@pytest.mark.promise(3)
@pytest.mark.promise(60)
@pytest.mark.parametrize("place", ["data", "checkpoint-4", "best"])
def test_writes_that_fail_as_on_a_full_disk(
    place: str, workbench: Workbench, finished: Run
) -> None:
    run = workbench.run("refused-writes")
    run.reserve_space()
    assert workbench.work(run, REFUSE_AT=place) == exit_status.EXIT_DISK_FULL
    assert "disk is full" in last(run, Failed).what
    for folder in checkpoint.list_checkpoints(run.checkpoints):
        assert checkpoint.find_fault(folder) is None
    run.write_state(*exit_status.state_for_exit_code(run, exit_status.EXIT_DISK_FULL))
    assert workbench.work(run, REFUSE_AT="") == 0
    assert weights(run) == weights(finished)
