"""A worker that hangs is noticed, with the stacks of its threads, and restarted if it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from run_folders import evaluated_event, make_run, step_event

from jetson_ft import events
from jetson_ft.recipe import Recipe
from jetson_ft.runs import hang, manager, store
from jetson_ft.runs.store import Run

pytestmark = pytest.mark.any_packages


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANG_SECONDS", "1")


def launch(light_runs: Any, label: str, **run: Any) -> Run:
    settings = {"output_dir": str(light_runs.root), "run": run}
    return manager.launch(Recipe.model_validate(settings), label)


def warnings(run: Run) -> list[str]:
    return [event.message for event in run.events() if isinstance(event, events.Warned)]


@pytest.mark.promise(64)
def test_step_that_hangs_in_c_with_the_gil_is_reported_with_stacks(light_runs: Any) -> None:
    run = launch(light_runs, "hanging")
    state = light_runs.state_with_reason(run)
    assert state.state == "running" and state.reason.startswith("no step for ")
    assert "log.txt" in state.reason and state.reason in warnings(run)
    log = (run.path / "log.txt").read_text()
    assert "most recent call first" in log and "in finetune" in log
    # It is only reported: the step goes on, and the reason is taken back.
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert run.state().attempt == 1 and not run.state().reason


@pytest.mark.promise(64)
@pytest.mark.promise(65)
def test_run_that_hangs_is_ended_and_restarted_if_it_resumes_itself(light_runs: Any) -> None:
    run = launch(light_runs, "hanging-always", auto_resume=True, max_restarts=1)
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    state = run.state()
    assert state.attempt == 2 and "hung" in state.reason and "1 times in a row" in state.reason


@pytest.mark.promise(64)
def test_stop_ends_a_run_that_hangs(light_runs: Any) -> None:
    run = launch(light_runs, "hanging-always")
    light_runs.worker(run)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"
    assert run.state().resumable


@pytest.mark.promise(64)
def test_damaged_lines_do_not_end_the_watch(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000-damaged")
    watch = hang.HangWatch(run)
    for damage in ({"step": 0}, {"step": -3}, {"grad_norm": 1e308}):
        with open(run.events_file, "ab") as file:
            file.write(orjson.dumps({**events.to_json(step_event(1)), **damage}) + b"\n")
    for tokens in ("many", None, [], -1e308):
        heldout = {"tokens": tokens}
        data = events.DataPrepared(sha256="", train={}, heldout=heldout, read={})
        with open(run.events_file, "ab") as file:
            file.write(orjson.dumps(events.to_json(data)) + b"\n")
            file.write(orjson.dumps(events.to_json(step_event(5))) + b"\n")
        assert not watch.update()


@pytest.mark.promise(64)
def test_what_takes_long_on_purpose_does_not_hang() -> None:
    progress = hang.Progress()
    assert progress.limit == hang.PHASE_SECONDS
    rows = {"tokens": 10_000}
    progress.update(events.DataPrepared(sha256="", train=rows, heldout=rows, read={}))
    progress.update(events.PhaseStarted(name="training"))
    assert progress.limit == hang.PHASE_SECONDS  # the first step
    # 100 tokens a step, 10 a second; an evaluation of 1000 s, by its tokens
    progress.update(step_event(5, tokens=500, tokens_per_second=10.0))
    assert progress.limit == 20 * 10 + 5 * 1000
    progress.update(evaluated_event(5, 2.0))  # of 1 s
    assert progress.limit == hang.STEP_SECONDS
    progress.update(step_event(6, tokens=60_000, tokens_per_second=10.0))
    assert progress.limit == 20 * 1000 + 5
    assert not progress.update(events.Sensors(step=6, source="psutil"))  # of another thread
    progress.update(events.Paused(step=6, temperature=90.0, limit=85.0, until=80.0))
    assert progress.limit is None
    progress.update(events.PauseEnded(step=6, temperature=79.0, seconds=900.0))
    assert progress.limit == 20 * 1000 + 5
    progress.update(events.PhaseEnded(name="training", seconds=1.0))
    progress.update(events.PhaseStarted(name="comparison"))
    assert progress.limit == hang.PHASE_SECONDS
