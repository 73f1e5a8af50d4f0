"""A power cut, a crash or a shutdown ends runs: they are offered or taken up, and not for ever."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import program
import psutil
import pytest
from run_folders import make_run
from served import Served

from jetson_ft.events import Warned
from jetson_ft.recipe import Recipe
from jetson_ft.runs import interrupted, manager, store
from jetson_ft.runs.processes import DistributedConfig
from jetson_ft.runs.store import Run

pytestmark = pytest.mark.any_packages


def launch(light_runs: Any, label: str, config: DistributedConfig | None = None, **run: Any) -> Run:
    """Launch a light run with settings of the recipe's section `run`."""
    settings = {"output_dir": str(light_runs.root), "run": {"auto_resume": True} | run}
    return manager.launch(Recipe.model_validate(settings), label, config)


def cut_power(light_runs: Any, *runs: Run, server: Served | None = None) -> None:
    """Kill all processes of the runs, and the page's server, at once."""
    processes = [light_runs.supervisor(run) for run in runs]
    processes += [worker for each in processes for worker in each.children(recursive=True)]
    if server:
        processes.append(psutil.Process(server.process.pid))
    for process in processes:
        process.suspend()  # no one records the death of another
    for process in processes:
        process.kill()
    for process in psutil.process_iter():
        if process in processes and process.ppid() == os.getpid():
            process.wait(5)
    light_runs.until(lambda: not any(map(store.Run.is_locked, runs, ["supervisor"] * len(runs))))


def take_up(light_runs: Any) -> str:
    """Run `jetson-ft runs resume`; return what it printed."""
    done = program.run("runs", "resume", "--runs", str(light_runs.root), cwd=light_runs.root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started_at(run: Run, attempt: int) -> float:
    """Return when the worker of an attempt started its work."""
    return float((run.path / f"worked-{attempt}").read_text())


def warnings(run: Run) -> list[str]:
    return [event.message for event in run.events() if isinstance(event, Warned)]


# --- power cut ---------------------------------------------------------------------------------


@pytest.mark.slow(minutes=0.3)  # it starts the page twice
@pytest.mark.promise(63)
def test_page_takes_up_the_runs_in_their_order_after_a_power_cut(light_runs: Any) -> None:
    first = launch(light_runs, "cut-last-by-name")
    light_runs.worker(first)
    second, third = launch(light_runs, "b-waits"), launch(light_runs, "a-waits")
    plain = launch(light_runs, "plain", auto_resume=False)
    for run in (second, third, plain):
        light_runs.state_with_reason(run)
    # By name, which is the order of the list, they are in another order.
    server = Served(light_runs.root.parent, "--runs", str(light_runs.root))
    cut_power(light_runs, first, second, third, plain, server=server)
    assert manager.reconcile_state(third) == "failed"  # as a list shows it
    server = Served(light_runs.root.parent, "--runs", str(light_runs.root))
    try:
        for run in (first, second, third):
            assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
        starts = [started_at(run, 2) for run in (first, second, third)]
        assert starts == sorted(starts)
        assert "restart 1 of at most 3" in warnings(first)[-1]
        assert "power cut" in warnings(first)[-1]
        page = server.get("/live/en/runs")
    finally:
        server.kill()
    # Without the key the run is offered, in the list and in the server's output.
    assert plain.state().state == "failed" and plain.state().interrupted
    assert page and page.text.count('data-do="resume"') == 1
    assert server.process.stdout
    assert f"{plain.name} can be resumed" in server.process.stdout.read()


@pytest.mark.promise(63)
def test_command_for_a_service_takes_up_what_was_cut_short(light_runs: Any) -> None:
    run = launch(light_runs, "cut")
    light_runs.worker(run)
    cut_power(light_runs, run)
    assert f"{run.name} was interrupted, and continues" in take_up(light_runs)
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert "No run" in take_up(light_runs)


@pytest.mark.promise(63)
def test_shutdown_is_no_request_of_a_person(light_runs: Any) -> None:
    """`docker stop`, `systemctl stop` and `poweroff` send SIGTERM to supervisors, or to all."""
    working = launch(light_runs, "cut")
    worker = light_runs.worker(working)
    waiting = launch(light_runs, "waits")
    light_runs.state_with_reason(waiting)
    supervisors = [light_runs.supervisor(run) for run in (waiting, working)]
    supervisors[0].terminate()  # else it may have its turn, and end, before the signal
    light_runs.wait(waiting, "stopped")
    os.kill(worker, signal.SIGTERM)
    supervisors[1].terminate()
    for run in (working, waiting):
        assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
        assert "shutdown" in run.state().reason
    take_up(light_runs)
    for run in (working, waiting):
        assert light_runs.wait(run, "finished", "failed") == "finished"


@pytest.mark.promise(63)
@pytest.mark.parametrize("then", ["ends", "power is cut", "shutdown"])
def test_run_that_a_person_stopped_is_not_taken_up(light_runs: Any, then: str) -> None:
    run = launch(light_runs, "cut")
    worker = light_runs.worker(run)
    if then != "ends":
        os.kill(worker, signal.SIGSTOP)  # in a long step
    manager.stop(run)
    if then == "shutdown":
        light_runs.supervisor(run).terminate()
        os.kill(worker, signal.SIGCONT)
    elif then == "power is cut":
        cut_power(light_runs, run)
    light_runs.wait(run, *store.ENDED_STATES)
    assert "can be resumed" in take_up(light_runs)
    assert run.state().attempt == 1


@pytest.mark.promise(63)
@pytest.mark.parametrize("label", ["refused", "faulty", "hungry-always"])
def test_fault_that_would_repeat_is_not_taken_up(light_runs: Any, label: str) -> None:
    run = launch(light_runs, label)
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    attempt = run.state().attempt
    take_up(light_runs)
    assert run.state().attempt == attempt and not run.state().interrupted


@pytest.mark.promise(63)
def test_command_to_resume_is_one_to_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000-it's; \x1b[2J", "running")
    run.write_state("stopped", resumable=True)
    (line,) = interrupted.take_up_runs(tmp_path)
    assert line.endswith("jetson-ft train --resume $'20260101-000000-it\\'s; \\x1b[2J'")


@pytest.mark.promise(63)
def test_run_on_several_machines_waits_for_a_person(light_runs: Any) -> None:
    """The other machines must be started with it."""
    config = DistributedConfig(nnodes=2, rendezvous="127.0.0.1:1")
    run = launch(light_runs, "cut", config)
    light_runs.until(lambda: light_runs.supervisor(run).children())
    cut_power(light_runs, run)
    assert "can be resumed" in take_up(light_runs)
    assert run.state().attempt == 1


@pytest.mark.promise(63)
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd")
def test_systemd_unit_is_valid(tmp_path: Path) -> None:
    unit = Path(__file__).parents[2] / "docker/jetson-ft.service"
    text = unit.read_text().replace("/opt/jetson-ft/.venv/bin/jetson-ft", "/bin/true")
    (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", str(tmp_path / unit.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


# --- crashes -----------------------------------------------------------------------------------


@pytest.mark.promise(65)
def test_crash_of_the_trainer_alone_is_restarted_so_many_times(light_runs: Any) -> None:
    run = launch(light_runs, "crashing", max_restarts=2)
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    state = run.state()
    assert state.attempt == 3 and state.resumable
    assert "restarted 2 times in a row" in state.reason and "signal 11" in state.reason
    assert sum("signal 11" in text for text in warnings(run)) == 2
    take_up(light_runs)
    assert run.state().attempt == 3


@pytest.mark.promise(65)
def test_new_checkpoint_resets_the_count(light_runs: Any) -> None:
    run = launch(light_runs, "crashing-advancing", max_restarts=1)
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert run.state().attempt == 6


@pytest.mark.promise(65)
def test_crash_is_only_recorded_without_the_key(light_runs: Any) -> None:
    run = launch(light_runs, "crashing", auto_resume=False)
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    assert run.state().attempt == 1
    assert run.state().reason == "crashed (signal 11)"


@pytest.mark.promise(65)
def test_power_cuts_count_too_and_a_persons_resume_starts_anew(light_runs: Any) -> None:
    run = launch(light_runs, "endless", max_restarts=1)
    light_runs.worker(run)
    cut_power(light_runs, run)
    assert "continues" in take_up(light_runs)
    light_runs.worker(run)
    cut_detached(run)
    assert "continues" not in take_up(light_runs)
    assert "restarted 1 times in a row" in run.state().reason
    manager.resume(run)
    light_runs.worker(run)
    cut_power(light_runs, run)
    assert "continues" in take_up(light_runs)


def cut_detached(run: Run) -> None:
    """Kill the processes of a run that another program started."""
    for process in psutil.process_iter(["cmdline"]):
        if str(run.path) in (process.info["cmdline"] or []):
            process.kill()


@pytest.mark.promise(65)
def test_keys_may_change_on_resume(light_runs: Any, tmp_path: Path) -> None:
    run = launch(light_runs, "crashing", auto_resume=False)
    light_runs.wait(run, *store.ENDED_STATES)
    manager.resume(run, ["run.auto_resume=true", "run.max_restarts=1"])
    light_runs.until(lambda: run.state().attempt == 3)
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
