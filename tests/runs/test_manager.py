"""Launching, queueing, stopping and resuming, in real processes that are killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from workbench import is_live

from jetson_ft.errors import Message, UserError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import contract, exit_status, manager, store
from jetson_ft.runs.locks import lock
from jetson_ft.runs.store import Run


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def began(run: Run, attempt: int = 1) -> float:
    return float((run.path / f"worked-{attempt}").read_text())


# --- launching -----------------------------------------------------------------------------


def test_run_finishes_and_leaves_no_process(light_runs: Any) -> None:
    run = light_runs.launch("plain")
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert run.state().reason == ""
    light_runs.until(lambda: not is_live(run))


def test_launched_run_never_looks_dead(light_runs: Any) -> None:
    """Another thread reconciles all the time, as a page does, while supervisors start."""
    over, seen = threading.Event(), set()

    def reconcile_all() -> None:
        while not over.is_set():
            seen.update(manager.reconcile_state(run) for run in store.list_runs(light_runs.root))

    watcher = threading.Thread(target=reconcile_all)
    watcher.start()
    try:
        runs = [light_runs.launch(f"n{number}") for number in range(3)]
        assert [light_runs.wait(run, *store.ENDED_STATES) for run in runs] == ["finished"] * 3
    finally:
        over.set()
        watcher.join()
    assert "failed" not in seen


def test_two_launches_at_once_run_one_and_queue_one(light_runs: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(light_runs.launch, ["endless-a", "endless-b"]))
    light_runs.until(lambda: any((run.path / "worked-1").exists() for run in runs))
    first, second = sorted(runs, key=lambda run: not (run.path / "worked-1").exists())
    assert (
        light_runs.state_with_reason(second).reason
        == "another run is training; this one starts after it"
    )
    assert not (second.path / "worked-1").exists()
    manager.stop(first)
    assert light_runs.wait(first, *store.ENDED_STATES) == "stopped"
    assert light_runs.wait(second, "running", "failed") == "running"


def test_queued_runs_start_in_order(light_runs: Any) -> None:
    first = light_runs.launch("endless")
    light_runs.worker(first)
    waiting = [light_runs.launch(f"w{number}") for number in range(3)]
    for run in waiting:
        light_runs.state_with_reason(run)
    manager.stop(first)
    for run in waiting:
        assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert [began(run) for run in waiting] == sorted(began(run) for run in waiting)


# --- stopping ---------------------------------------------------------------------------------


def test_stop_twice_equals_stop_once(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.worker(run)
    manager.stop(run)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
    assert run.state().resumable
    manager.stop(run)
    assert run.state().state == "stopped" and not run.stop_requested()


def test_stop_before_the_worker_starts_stops_the_run(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"


def test_stop_of_a_queued_run_leaves_the_running_one(light_runs: Any) -> None:
    first = light_runs.launch("endless")
    light_runs.worker(first)
    second = light_runs.launch("endless")
    light_runs.state_with_reason(second)
    manager.stop(second)
    assert light_runs.wait(second, *store.ENDED_STATES) == "stopped"
    assert "queue" in second.state().reason
    assert not (second.path / "worked-1").exists()
    assert manager.reconcile_state(first) == "running"


# --- resuming ---------------------------------------------------------------------------------


def test_resume_raises_the_attempt_and_clears_the_stop(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.worker(run)
    manager.stop(run)
    light_runs.wait(run, "stopped")
    manager.resume(run)
    assert light_runs.worker(run) and light_runs.wait(run, "running")
    assert run.state().attempt == 2 and not run.stop_requested()


def test_resume_of_a_running_run_is_refused(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.worker(run)
    with pytest.raises(UserError, match="is running"):
        manager.resume(run)
    assert run.state().attempt == 1


def test_two_resumes_at_once_refuse_one(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    manager.stop(run)
    light_runs.wait(run, "stopped")

    def resume(_: int) -> str:
        try:
            return str(manager.resume(run).state().attempt)
        except UserError as error:
            return str(error.what)

    with ThreadPoolExecutor(2) as pool:
        results = sorted(pool.map(resume, range(2)))
    assert results == ["2", f"{run.name} is running."]


def test_finished_run_is_resumed_only_if_longer(light_runs: Any) -> None:
    run = light_runs.launch("plain", epochs=1.0)
    light_runs.wait(run, "finished")
    with pytest.raises(UserError, match="is finished") as caught:
        manager.resume(run)
    assert "train.epochs" in str(caught.value.fix)
    manager.resume(run, ["train.epochs=2.0"])
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert run.recipe().train.epochs == 2.0 and (run.path / "worked-2").exists()


# --- what a resumed run may change ------------------------------------------------------------

OLD = {"epochs": 2.0, "max_steps": None, "max_minutes": 10.0}


@pytest.fixture
def ended(tmp_path: Path) -> Run:
    """Return a stopped run without processes."""
    run = store.create_run(Recipe.model_validate({"output_dir": str(tmp_path), "train": OLD}), "x")
    run.write_state("stopped")
    return run


@pytest.mark.parametrize(
    "override", ["train.epochs=1.5", "train.max_minutes=9", "train.max_steps=100"]
)
def test_resume_with_a_shorter_run_is_refused(ended: Run, override: str) -> None:
    with pytest.raises(UserError, match="can only become longer"):
        manager.resume(ended, [override])


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        ({"epochs": 2.5}, True),
        ({"max_minutes": 11.0}, True),
        ({"max_minutes": None}, True),  # no limit is longer than any
        ({"max_steps": None, "epochs": 3.0}, True),
        ({"max_memory_gb": 0.5}, True),  # less memory only splits a step in another way
        ({"max_minutes": 11.0, "epochs": 1.0}, False),
        ({"max_steps": 5}, False),
    ],
)
def test_each_length_key_may_only_grow(ended: Run, changes: dict[str, Any], fine: bool) -> None:
    new = Recipe.model_validate({"output_dir": ended.recipe().output_dir, "train": OLD | changes})
    if fine:
        contract.check_only_longer(ended, ended.recipe(), new)
    else:
        with pytest.raises(UserError):
            contract.check_only_longer(ended, ended.recipe(), new)


def test_unknown_key_on_resume_changes_nothing(ended: Run) -> None:
    with pytest.raises(UserError, match="unknown key"):
        manager.resume(ended, ["train.epoch=3"])
    assert ended.state().state == "stopped"


def test_launched_recipe_has_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light_runs: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    for name in ("mine.jinja", "chatml"):
        (tmp_path / name).write_text("{{ messages }}")
    data = {"train": "rows.json", "chat_template": "mine.jinja"}
    recipe = Recipe.model_validate({"output_dir": "here", "data": data})
    run = manager.launch(recipe, "x")
    assert run.recipe().data.chat_template == str(tmp_path / "mine.jinja")
    assert run.recipe().data.train == str(tmp_path / "rows.json")
    assert run.recipe().output_dir == str(tmp_path / "here")
    assert (run.recipe().model, run.recipe().data.heldout) == ("embedded", "auto")
    light_runs.wait(run, "finished")
    recipe.data.chat_template = "chatml"
    run = manager.launch(recipe, "y")
    assert run.recipe().data.chat_template == "chatml", "a shipped one, whatever files there are"
    light_runs.wait(run, "finished")


def test_paths_in_a_list_of_sources_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light_runs: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "bundled").touch()
    train = ["rows.json", {"source": "rows.json", "share": 0.5}, "bundled"]
    recipe = Recipe.model_validate({"output_dir": "here", "data": {"train": train}})
    run = manager.launch(recipe, "x")
    path = str(tmp_path / "rows.json")
    assert [str(item) for item in run.recipe().data.sources()] == [
        path, f"{path} (share 0.5)", "bundled",
    ]  # fmt: skip
    light_runs.wait(run, "finished")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [("gone.json", None, "Data file not found"), ("bad.json", "[{}]", "no known layout")],
)
def test_fault_of_any_source_in_a_list_is_found_before_the_run(
    tmp_path: Path, light_runs: Any, name: str, content: str | None, what: str
) -> None:
    if content:
        (tmp_path / name).write_text(content)
    train = ["bundled", {"source": str(tmp_path / name), "rows": 5}]
    recipe = Recipe.model_validate({"output_dir": str(light_runs.root), "data": {"train": train}})
    with pytest.raises(UserError, match=what) as caught:
        manager.launch(recipe, "x")
    assert name in str(caught.value.where)
    assert not store.list_runs(light_runs.root)


# --- killed processes -------------------------------------------------------------------------


def test_killed_worker_frees_the_queue(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    worker = light_runs.worker(run)
    waiting = light_runs.launch("after")
    light_runs.state_with_reason(waiting)
    kill(worker)
    assert light_runs.wait(waiting, *store.ENDED_STATES) == "finished"


def test_killed_supervisor_leaves_the_slot_taken_and_stop_working(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.kill_supervisor(run)
    assert manager.reconcile_state(run) == "running" and not run.is_locked("supervisor")
    with pytest.raises(UserError, match="is running"):
        manager.resume(run)
    waiting = light_runs.launch("after")
    assert light_runs.state_with_reason(waiting).state == "queued"
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
    assert light_runs.wait(waiting, *store.ENDED_STATES) == "finished"


def test_killed_supervisor_and_worker_give_a_resumable_failure(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    worker, supervisor = light_runs.worker(run), light_runs.supervisor(run)
    supervisor.kill()
    kill(worker)
    supervisor.wait(5)
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    assert run.state().resumable and "power cut" in run.state().reason
    manager.resume(run)
    assert light_runs.worker(run)


def test_killed_queued_supervisor_frees_the_queue(light_runs: Any) -> None:
    first = light_runs.launch("endless")
    light_runs.worker(first)
    second, third = light_runs.launch("second"), light_runs.launch("third")
    for run in (second, third):
        light_runs.state_with_reason(run)
    light_runs.supervisor(second).kill()
    assert light_runs.wait(second, *store.ENDED_STATES) == "failed"
    manager.stop(first)
    assert light_runs.wait(third, *store.ENDED_STATES) == "finished"
    assert not (second.path / "worked-1").exists()


# --- reconciling ------------------------------------------------------------------------------


def test_reconcile_never_overwrites_an_ended_state(
    ended: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor writes the end between the first read of the state and the lock."""
    ended.write_state("running")

    def is_locked(run: Run, name: str) -> bool:
        run.write_state("finished")
        return False

    monkeypatch.setattr(Run, "is_locked", is_locked)
    assert manager.reconcile_state(ended) == "finished"
    assert ended.state().state == "finished"


def test_resumable_runs_are_those_cut_short(ended: Run) -> None:
    root = ended.path.parent
    for state, message in (("finished", None), ("failed", Message("No such file."))):
        ended.write_state(state, message)
        assert manager.resumable_runs(root) == []
    ended.write_state(*exit_status.state_for_exit_code(ended, exit_status.EXIT_STOPPED))
    assert [run.path for run in manager.resumable_runs(root)] == [ended.path]
    ended.write_state("running")  # its processes are gone: a power cut
    assert [run.path for run in manager.resumable_runs(root)] == [ended.path]
    (ended.path / "state.json").write_text("{")
    assert manager.resumable_runs(root) == []


@pytest.mark.parametrize("name", ["worker", "supervisor"])
def test_reconcile_leaves_a_live_run_unchanged(ended: Run, name: str) -> None:
    ended.write_state("running")
    held = lock(ended.path / f"{name}.lock")
    assert manager.reconcile_state(ended) == "running"
    assert held
    held.close()
    assert manager.reconcile_state(ended) == "failed"


def test_state_is_written_only_with_the_lock(
    light_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This covers the command's writes and those of reconciling; the supervisor has the lock."""
    write, held = Run.write_state, []

    def spy(run: Run, *values: Any, **named: Any) -> None:
        held.append(run.is_locked("supervisor"))
        write(run, *values, **named)

    monkeypatch.setattr(Run, "write_state", spy)
    run = light_runs.launch("endless")
    light_runs.worker(run)
    manager.stop(run)
    light_runs.wait(run, "stopped")
    manager.resume(run)
    worker, supervisor = light_runs.worker(run), light_runs.supervisor(run)
    supervisor.kill()
    kill(worker)
    supervisor.wait(5)
    light_runs.wait(run, "failed")
    assert held == [True] * 3


def test_launch_returns_within_a_second(light_runs: Any) -> None:
    started = time.monotonic()
    light_runs.launch("plain")
    assert time.monotonic() - started < 1.0
