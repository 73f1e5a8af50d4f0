"""No trainer lives without a keeper: locks, Stop, Resume and Delete look at processes that live."""

from __future__ import annotations

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from jetson_ft.errors import UserError
from jetson_ft.events import Exited
from jetson_ft.runs import exit_status, manager, queue, store, supervisor
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.locks import lock
from jetson_ft.runs.processes import DistributedConfig, read_distributed_config
from jetson_ft.runs.store import Run

pytestmark = pytest.mark.any_packages


def worker_processes(run: Run) -> list[psutil.Process]:
    """Return the living workers and launchers of a run, in any phase of their start."""
    processes = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        is_worker = {"jetson_ft.runs.worker", "jetson_ft.runs.launcher"} & set(command)
        if is_worker and str(run.path) in command and process.info["status"] != "zombie":
            processes.append(process)
    return processes


def kill(number: int) -> None:
    os.kill(number, signal.SIGKILL)


def assert_kept(run: Run) -> None:
    """A run whose worker lives is shown as running, and is neither resumed nor deleted."""
    assert manager.reconcile_state(run) in ("running", "stopping")
    for act in (manager.resume, manager.delete):
        with pytest.raises(UserError, match="is running"):
            act(run)
    assert queue.running_run() == run.path


@pytest.mark.promise(52)
@pytest.mark.promise(53)
def test_worker_that_starts_is_kept_when_its_supervisor_is_killed(light_runs: Any) -> None:
    run = light_runs.launch("endless-late")
    light_runs.until(lambda: worker_processes(run))
    supervisor = light_runs.supervisor(run)
    supervisor.kill()
    supervisor.wait(5)
    assert worker_processes(run) and not (run.path / "worked-1").exists()
    assert_kept(run)
    light_runs.worker(run)
    assert_kept(run)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
    light_runs.until(lambda: not worker_processes(run))
    assert queue.running_run() is None


@pytest.mark.promise(52)
def test_supervisor_killed_before_its_worker_exists_leaves_a_resumable_run(
    light_runs: Any,
) -> None:
    first = light_runs.launch("endless")
    light_runs.worker(first)
    run = light_runs.launch("plain")
    light_runs.state_with_reason(run)
    light_runs.supervisor(run).kill()
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    assert run.state().resumable and not worker_processes(run)
    manager.stop(first)
    manager.resume(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"


@pytest.mark.promise(52)
def test_supervisor_killed_before_it_writes_the_end_hides_no_result(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    worker = psutil.Process(light_runs.worker(run))
    supervisor = light_runs.supervisor(run)
    supervisor.suspend()
    manager.stop(run)
    light_runs.until(lambda: worker.status() == psutil.STATUS_ZOMBIE)
    assert run.state().state == "running" and queue.running_run() == run.path
    supervisor.kill()
    supervisor.wait(5)
    assert manager.reconcile_state(run) == "stopped" and run.state().resumable
    assert queue.running_run() is None


@pytest.mark.promise(52)
def test_launchers_workers_end_with_it(light_runs: Any) -> None:
    """The launcher holds the lock for its workers, so none may outlive it."""
    recipe = light_runs.recipe()
    run = manager.launch(recipe, "endless", DistributedConfig(nproc_per_node=2))
    worker = psutil.Process(light_runs.worker(run))
    launcher = worker.parent()
    assert launcher and "jetson_ft.runs.launcher" in launcher.cmdline()
    light_runs.until(lambda: len(launcher.children()) == 2)
    workers = launcher.children()
    light_runs.supervisor(run).kill()
    assert_kept(run)
    launcher.kill()
    _gone, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"


@pytest.mark.promise(53)
@pytest.mark.parametrize("state", ["failed", "finished", "stopped", "queued"])
def test_written_state_does_not_hide_a_living_worker(light_runs: Any, state: str) -> None:
    run = light_runs.launch("endless")
    light_runs.kill_supervisor(run)
    run.write_state(state)
    assert_kept(run)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"


@pytest.mark.promise(53)
def test_readers_at_the_same_time_take_each_other_for_no_worker(light_runs: Any) -> None:
    """A test of a lock is no process that lives, or an ended run would become a running one."""
    first = light_runs.launch("endless")
    light_runs.worker(first)  # else the second could be the first in the queue
    run = light_runs.launch("waits")
    light_runs.state_with_reason(run)
    manager.stop(run)
    light_runs.wait(run, "stopped")
    light_runs.until(lambda: not run.is_locked("supervisor"))
    (run.path / "worker.lock").touch()  # as after an attempt
    manager.stop(first)
    light_runs.until(lambda: queue.running_run() is None)
    ended, deadline = run.state(), time.monotonic() + 0.7

    def read(_reader: int) -> set[str]:
        states = set()
        while time.monotonic() < deadline:
            states.add(manager.reconcile_state(Run(run.path)))
            assert queue.running_run() is None
        return states

    with ThreadPoolExecutor(4) as pool:
        assert set().union(*pool.map(read, range(4))) == {"stopped"}
    assert run.state() == ended


@pytest.mark.promise(53)
def test_nothing_starts_while_a_run_is_deleted(light_runs: Any, monkeypatch: Any) -> None:
    run = light_runs.launch("plain")
    light_runs.wait(run, "finished")
    light_runs.until(lambda: not run.is_locked("supervisor"))
    held = []
    rename = Path.rename

    def spy(self: Path, target: Path) -> Path:
        held.append(run.is_locked("supervisor"))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    manager.delete(run)
    assert held == [True] and not run.path.exists()


@pytest.mark.promise(54)
@pytest.mark.parametrize("with_supervisor", [True, False])
@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_worker_ends_when_its_folder_is_removed(
    light_runs: Any, how: str, with_supervisor: bool
) -> None:
    run = light_runs.launch("endless")
    worker = psutil.Process(light_runs.worker(run))
    supervisor = light_runs.supervisor(run)
    if not with_supervisor:
        supervisor.kill()
    if how == "removed":
        shutil.rmtree(run.path)
    else:
        run.path.rename(run.path.with_name("elsewhere"))
    if how == "replaced":
        run.path.mkdir()
    _gone, alive = psutil.wait_procs([worker, supervisor], timeout=5)
    assert not alive and queue.running_run() is None
    assert list(run.path.iterdir()) == [] if how == "replaced" else not run.path.exists()


@pytest.mark.promise(54)
def test_end_is_not_written_into_another_folder(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    worker, supervisor = light_runs.worker(run), light_runs.supervisor(run)
    supervisor.suspend()
    run.path.rename(run.path.with_name("elsewhere"))
    run.path.mkdir()
    kill(worker)  # the supervisor sees this end before it looks at the folder again
    supervisor.resume()
    supervisor.wait(5)
    assert list(run.path.iterdir()) == []


@pytest.mark.promise(54)
def test_queued_run_ends_when_its_folder_is_removed(light_runs: Any) -> None:
    first = light_runs.launch("endless")
    light_runs.worker(first)
    second, third = light_runs.launch("second"), light_runs.launch("third")
    light_runs.state_with_reason(third)
    supervisor = light_runs.supervisor(second)
    while second.path.exists():  # its supervisor may be writing the state
        shutil.rmtree(second.path, ignore_errors=True)
    supervisor.wait(5)
    manager.stop(first)
    assert light_runs.wait(third, *store.ENDED_STATES) == "finished"
    assert not second.path.exists()


@pytest.mark.promise(13)
def test_killed_trainer_is_failed_within_five_seconds(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    worker, killed = light_runs.worker(run), time.monotonic()
    kill(worker)
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=5.0) == "failed"
    assert time.monotonic() - killed < 5
    assert run.state().reason.startswith("crashed (signal 9)")


@pytest.mark.promise(13)
def test_killed_trainer_without_a_supervisor_is_not_running(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.kill_supervisor(run)
    kill(light_runs.worker(run))
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=5.0) == "failed"
    assert run.state().resumable


@pytest.mark.promise(13)
def test_end_that_the_supervisor_could_not_write_is_read_from_the_events(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.kill_supervisor(run)
    EventLog(run, 1).emit(Exited(code=0))
    kill(light_runs.worker(run))
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"


@pytest.mark.promise(8)
@pytest.mark.parametrize("door", ["stop", "worker", "supervisor"])
def test_request_to_stop_by_any_door_ends_the_run_stopped(light_runs: Any, door: str) -> None:
    run = light_runs.launch("endless")
    worker = light_runs.worker(run)
    if door == "stop":
        manager.stop(run)
    elif door == "worker":
        os.kill(worker, signal.SIGTERM)
    else:
        light_runs.supervisor(run).terminate()
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
    assert run.state().resumable


@pytest.mark.promise(15)
def test_second_stop_is_harmless(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.worker(run)
    for _time in range(3):
        manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
    manager.stop(run)
    assert run.state().state == "stopped" and not (run.path / "stop").exists()


@pytest.mark.promise(15)
def test_a_process_number_in_use_again_shows_nothing_as_alive(light_runs: Any) -> None:
    """Locks alone count: files that name a living process are left from before."""
    run = light_runs.launch("plain")
    light_runs.wait(run, "finished")
    light_runs.until(lambda: not run.is_locked("supervisor"))
    for name in ("pid", "worker.lock", "supervisor.lock"):
        (run.path / name).write_text(str(os.getpid()))
    run.write_state("running")
    assert manager.reconcile_state(run) == "finished"
    assert psutil.pid_exists(os.getpid())


@pytest.mark.promise(52)
def test_second_worker_does_not_start_beside_one_that_lives(light_runs: Any, queued: Any) -> None:
    run = queued("plain")
    held = lock(run.path / "worker.lock")
    assert held
    with pytest.raises(UserError, match="is running"):
        manager.resume(run)
    assert not (run.path / "worked-1").exists()
    assert read_distributed_config(run) == DistributedConfig()

    def never(_run: Run, _locks: Any) -> int:
        raise AssertionError("a second worker has started")

    with open(run.path / "slot", "wb") as slot:
        status = supervisor._run_attempts(run, slot, never)
    assert status == exit_status.state_for_exit_code(run, exit_status.EXIT_FAILED)
    assert status.state == "failed" and not status.interrupted
