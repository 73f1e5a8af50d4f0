"""Launching, queueing, stopping and resuming, in real processes that get killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import ending, jobs, rundir
from jetson_ft.runs.rundir import Run, lock


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def began(run: Run, attempt: int = 1) -> float:
    return float((run.path / f"worked-{attempt}").read_text())


# --- the ordinary life ------------------------------------------------------------------------


def test_a_run_ends_finished_and_leaves_no_process(shop: Any) -> None:
    run = shop.launch("plain")
    assert shop.wait(run, *rundir.ENDED) == "finished"
    assert run.state().reason == ""
    shop.until(lambda: not run.is_live())


def test_a_launched_run_never_looks_dead(shop: Any) -> None:
    """Somebody else settles all the time, as a page does, while supervisors start."""
    over, seen = threading.Event(), set()

    def settle_all() -> None:
        while not over.is_set():
            seen.update(jobs.settle(run) for run in rundir.list_runs(shop.root))

    watcher = threading.Thread(target=settle_all)
    watcher.start()
    try:
        runs = [shop.launch(f"n{number}") for number in range(3)]
        assert [shop.wait(run, *rundir.ENDED) for run in runs] == ["finished"] * 3
    finally:
        over.set()
        watcher.join()
    assert "failed" not in seen


def test_two_launches_at_once_one_runs_and_one_waits_and_says_so(shop: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(shop.launch, ["endless-a", "endless-b"]))
    shop.until(lambda: any((run.path / "worked-1").exists() for run in runs))
    first, second = sorted(runs, key=lambda run: not (run.path / "worked-1").exists())
    assert shop.told(second).reason == "another run is training; this one starts after it"
    assert not (second.path / "worked-1").exists()
    jobs.stop(first)
    assert shop.wait(first, *rundir.ENDED) == "stopped"
    assert shop.wait(second, "running", "failed") == "running"


def test_the_queue_keeps_its_order(shop: Any) -> None:
    first = shop.launch("endless")
    shop.worker(first)
    waiting = [shop.launch(f"w{number}") for number in range(3)]
    for run in waiting:
        shop.told(run)
    jobs.stop(first)
    for run in waiting:
        assert shop.wait(run, *rundir.ENDED) == "finished"
    assert [began(run) for run in waiting] == sorted(began(run) for run in waiting)


# --- stopping ---------------------------------------------------------------------------------


def test_stop_twice_is_stop(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    jobs.stop(run)
    jobs.stop(run)
    assert shop.wait(run, *rundir.ENDED) == "stopped"
    assert "resumable" in run.state().reason
    jobs.stop(run)
    assert run.state().state == "stopped" and not run.stop_requested()


def test_stop_before_the_worker_works(shop: Any) -> None:
    run = shop.launch("endless")
    jobs.stop(run)
    assert shop.wait(run, *rundir.ENDED) == "stopped"


def test_stop_in_the_queue_ends_that_run_alone(shop: Any) -> None:
    first = shop.launch("endless")
    shop.worker(first)
    second = shop.launch("endless")
    shop.told(second)
    jobs.stop(second)
    assert shop.wait(second, *rundir.ENDED) == "stopped"
    assert "queue" in second.state().reason
    assert not (second.path / "worked-1").exists()
    assert jobs.settle(first) == "running"


# --- resuming ---------------------------------------------------------------------------------


def test_resuming_counts_attempts_and_forgets_the_stop(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    jobs.stop(run)
    shop.wait(run, "stopped")
    jobs.resume(run)
    assert shop.worker(run) and shop.wait(run, "running")
    assert run.state().attempt == 2 and not run.stop_requested()


def test_a_running_run_is_not_resumed(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    with pytest.raises(UserError, match="is running already"):
        jobs.resume(run)
    assert run.state().attempt == 1


def test_of_two_resumes_at_once_one_is_refused(shop: Any) -> None:
    run = shop.launch("endless")
    jobs.stop(run)
    shop.wait(run, "stopped")

    def resume(_: int) -> str:
        try:
            return str(jobs.resume(run).state().attempt)
        except UserError as error:
            return error.what

    with ThreadPoolExecutor(2) as pool:
        said = sorted(pool.map(resume, range(2)))
    assert said == ["2", f"{run.name} is running already."]


def test_a_finished_run_is_resumed_only_to_be_longer(shop: Any) -> None:
    run = shop.launch("plain", epochs=1.0)
    shop.wait(run, "finished")
    with pytest.raises(UserError, match="is finished") as caught:
        jobs.resume(run)
    assert "train.epochs" in caught.value.fix
    jobs.resume(run, ["train.epochs=2.0"])
    assert shop.wait(run, *rundir.ENDED) == "finished"
    assert run.recipe().train.epochs == 2.0 and (run.path / "worked-2").exists()


# --- what a resumed run may change ------------------------------------------------------------

OLD = {"epochs": 2.0, "max_steps": 0, "max_minutes": 10.0}


@pytest.fixture
def ended(tmp_path: Path) -> Run:
    """A stopped run, with nobody working on it."""
    run = rundir.create(Recipe.model_validate({"output": str(tmp_path), "train": OLD}), "x")
    run.write_state("stopped")
    return run


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate: 0.0002 -> 0.001"),
        ("train.seed=5", "train.seed: 0 -> 5"),
        ("train.tokens_per_step=99", "train.tokens_per_step: 4096 -> 99"),
        ("lora.rank=64", "lora.rank: 16 -> 64"),
        ("lora.targets=[q_proj]", "lora.targets: 'all-linear' -> ['q_proj']"),
        ("data.train=other.json", "data.train: 'bundled' -> 'other.json'"),
    ],
)
def test_what_is_learnt_may_not_change(ended: Run, override: str, difference: str) -> None:
    with pytest.raises(UserError, match="must learn the same thing") as caught:
        jobs.resume(ended, [override])
    assert difference in caught.value.what
    assert ended.state().attempt == 1 and ended.recipe().train.learning_rate == 2e-4
    assert lock(ended.path / "supervisor.lock"), "the refusal let the lock go"


@pytest.mark.parametrize(
    "override", ["train.epochs=1.5", "train.max_minutes=9", "train.max_steps=100"]
)
def test_a_resumed_run_may_not_be_shorter(ended: Run, override: str) -> None:
    with pytest.raises(UserError, match="can only become longer"):
        jobs.resume(ended, [override])


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        ({"epochs": 2.5}, True),
        ({"max_minutes": 11.0}, True),
        ({"max_minutes": 0.0}, True),  # no limit is longer than any
        ({"max_steps": 0, "epochs": 3.0}, True),
        ({"max_memory_gb": 0.5}, True),  # less memory cuts a step in other pieces, no more
        ({"max_minutes": 11.0, "epochs": 1.0}, False),
        ({"max_steps": 5}, False),
    ],
)
def test_longer_is_judged_key_by_key(ended: Run, changes: dict[str, Any], fine: bool) -> None:
    new = Recipe.model_validate({"output": ended.recipe().output, "train": OLD | changes})
    if fine:
        jobs.check_only_longer(ended, ended.recipe(), new)
    else:
        with pytest.raises(UserError):
            jobs.check_only_longer(ended, ended.recipe(), new)


def test_an_override_that_is_no_recipe_is_refused_before_anything_changes(ended: Run) -> None:
    with pytest.raises(UserError, match="unknown key"):
        jobs.resume(ended, ["train.epoch=3"])
    assert ended.state().state == "stopped"


def test_a_run_finds_its_files_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shop: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    recipe = Recipe.model_validate({"output": "here", "data": {"train": "rows.json"}})
    run = jobs.launch(recipe, "x")
    assert run.recipe().data.train == str(tmp_path / "rows.json")
    assert run.recipe().output == str(tmp_path / "here")
    assert (run.recipe().model, run.recipe().data.heldout) == ("embedded", "auto")
    shop.wait(run, "finished")


# --- killed processes -------------------------------------------------------------------------


def test_a_killed_worker_is_told_within_five_seconds(shop: Any) -> None:
    run = shop.launch("endless")
    kill(shop.worker(run))
    assert shop.wait(run, *rundir.ENDED, seconds=5.0) == "failed"
    assert run.state().reason.startswith("crashed (signal 9)")


def test_the_next_one_runs_after_a_killed_one(shop: Any) -> None:
    run = shop.launch("endless")
    worker = shop.worker(run)
    waiting = shop.launch("after")
    shop.told(waiting)
    kill(worker)
    assert shop.wait(waiting, *rundir.ENDED) == "finished"


def test_without_its_supervisor_a_worker_keeps_the_slot_and_stop_works(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    supervisor = shop.supervisor(run)
    supervisor.kill()
    supervisor.wait(5)
    assert jobs.settle(run) == "running" and not run.is_locked("supervisor")
    with pytest.raises(UserError, match="is running already"):
        jobs.resume(run)
    waiting = shop.launch("after")
    assert shop.told(waiting).state == "queued"
    jobs.stop(run)
    assert shop.wait(run, *rundir.ENDED) == "stopped"
    assert shop.wait(waiting, *rundir.ENDED) == "finished"


def test_without_its_supervisor_a_finished_run_is_still_finished(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    supervisor = shop.supervisor(run)
    supervisor.kill()
    supervisor.wait(5)
    rundir.EventLog(run, 1).emit("end", code=0)
    kill(shop.worker(run))
    assert shop.wait(run, *rundir.ENDED) == "finished"


def test_after_a_power_cut_a_run_is_settled_and_resumable(shop: Any) -> None:
    run = shop.launch("endless")
    worker, supervisor = shop.worker(run), shop.supervisor(run)
    supervisor.kill()
    kill(worker)
    supervisor.wait(5)
    assert shop.wait(run, *rundir.ENDED) == "failed"
    assert run.state().reason == "ended without a word (power cut, or killed); resumable"
    jobs.resume(run)
    assert shop.worker(run)


def test_a_supervisor_killed_in_the_queue_frees_the_queue(shop: Any) -> None:
    first = shop.launch("endless")
    shop.worker(first)
    second, third = shop.launch("second"), shop.launch("third")
    for run in (second, third):
        shop.told(run)
    shop.supervisor(second).kill()
    assert shop.wait(second, *rundir.ENDED) == "failed"
    jobs.stop(first)
    assert shop.wait(third, *rundir.ENDED) == "finished"
    assert not (second.path / "worked-1").exists()


def test_a_supervisor_asked_to_end_stops_its_worker_first(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    shop.supervisor(run).terminate()
    assert shop.wait(run, *rundir.ENDED) == "stopped"


# --- settling ---------------------------------------------------------------------------------


def test_settle_never_overwrites_an_end(ended: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor writes the end between the first look at the state and the lock."""
    ended.write_state("running")

    def is_live(run: Run) -> bool:
        run.write_state("finished")
        return False

    monkeypatch.setattr(Run, "is_live", is_live)
    assert jobs.settle(ended) == "finished"
    assert ended.state().state == "finished"


def test_what_was_cut_short_is_offered_and_nothing_else(ended: Run) -> None:
    root = ended.path.parent
    for state, reason in (("finished", ""), ("failed", "No such file.")):
        ended.write_state(state, reason)
        assert jobs.resumable(root) == []
    ended.write_state(*ending.of_code(ended, ending.EXIT_STOPPED))
    assert [run.path for run in jobs.resumable(root)] == [ended.path]
    ended.write_state("running")  # its processes are gone: a power cut
    assert [run.path for run in jobs.resumable(root)] == [ended.path]
    (ended.path / "state.json").write_text("{")
    assert jobs.resumable(root) == []


@pytest.mark.parametrize("name", ["worker", "supervisor"])
def test_settle_leaves_the_living_alone(ended: Run, name: str) -> None:
    ended.write_state("running")
    held = lock(ended.path / f"{name}.lock")
    assert jobs.settle(ended) == "running"
    assert held
    held.close()
    assert jobs.settle(ended) == "failed"


def test_only_who_holds_the_lock_writes_the_state(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the launcher's and the settler's writes; the supervisor's own follow from its birth."""
    write, held = Run.write_state, []

    def spy(run: Run, *values: Any, **named: Any) -> None:
        held.append(run.is_locked("supervisor"))
        write(run, *values, **named)

    monkeypatch.setattr(Run, "write_state", spy)
    run = shop.launch("endless")
    shop.worker(run)
    jobs.stop(run)
    shop.wait(run, "stopped")
    jobs.resume(run)
    worker, supervisor = shop.worker(run), shop.supervisor(run)
    supervisor.kill()
    kill(worker)
    supervisor.wait(5)
    shop.wait(run, "failed")
    assert held == [True] * 3


def test_time_between_launch_and_return_is_short(shop: Any) -> None:
    started = time.monotonic()
    shop.launch("plain")
    assert time.monotonic() - started < 1.0
