"""Curves and summaries from events as they grow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import copy_finished, evaluated_event, step_event

from jetson_ft.errors import Message
from jetson_ft.events import Generated, PhaseEnded, PhaseStarted, Warned
from jetson_ft.runs import locks, manager
from jetson_ft.runs.curve import Curve
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.monitor import RunMonitor
from jetson_ft.runs.store import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "20260101-000000-quickstart"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("version: 1\n")
    made = Run(folder)
    made.write_state("finished")
    return made


# Curves

values_by_step = st.lists(st.tuples(st.integers(0, 40), st.floats(-10, 10)))


@given(values_by_step)
def test_repeated_step_takes_the_new_value_and_steps_ascend(pairs: list[tuple[int, float]]) -> None:
    curve = Curve()
    for number, value in pairs:
        curve.add(number, value)
    assert curve.points() == sorted(dict(pairs).items())


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(2, 40))
def test_fewer_points_keep_minimum_and_maximum(values: list[float], at_most: int) -> None:
    curve = Curve()
    for number, value in enumerate(values):
        curve.add(number, value)
    points = curve.points(at_most)
    assert len(points) <= max(at_most, 2)
    assert points == sorted(points, key=lambda point: point[0])
    assert {min(values), max(values)} <= {value for _, value in points}


# Following


def test_new_events_update_phase_and_curves(run: Run) -> None:
    watcher, log = RunMonitor(), EventLog(run, 1)
    assert watcher.progress(run).curves == {}
    log.emit(PhaseStarted(name="training"))
    log.emit(step_event(1, loss=3.0))
    progress = watcher.progress(run)
    assert progress.phase == "training" and progress.curves["loss"].points() == [(1, 3.0)]
    log.emit(step_event(2, loss=float("nan")))
    log.emit(step_event(3, loss=2.0))
    log.emit(evaluated_event(3, 2.5))
    with open(run.events_file, "a") as file:
        file.write('{"kind": "step", "half a li')
    progress = watcher.progress(run)
    assert progress.curves["loss"].points() == [(1, 3.0), (3, 2.0)]
    assert progress.curves["heldout_loss"].points() == [(3, 2.5)]


def test_steps_of_a_later_attempt_replace_the_old_ones(run: Run) -> None:
    watcher = RunMonitor()
    for attempt, losses in ((1, {1: 3.0, 2: 9.0}), (2, {2: 2.0, 3: 1.0})):
        log = EventLog(run, attempt)
        for number, loss in losses.items():
            log.emit(step_event(number, loss=loss))
    assert watcher.progress(run).curves["loss"].points() == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_distinct_warnings_of_the_newest_attempt_are_kept_up_to_a_limit(run: Run) -> None:
    watcher = RunMonitor()

    def warn(attempt: int, *texts: str) -> list[str]:
        for text in texts:
            EventLog(run, attempt).emit(Warned.of_message(Message(text)))
        return [warned.message for warned in watcher.progress(run).warnings]

    assert warn(1, "a", "b", "a") == ["a", "b"]
    EventLog(run, 2).emit(PhaseStarted(name="data"))
    assert watcher.progress(run).warnings == []
    assert warn(2, "b", "c") == ["b", "c"]
    assert len(warn(2, *map(str, range(100)))) == 20


def test_new_run_of_the_same_name_is_read_from_its_start(run: Run) -> None:
    watcher = RunMonitor()
    for number in range(1, 6):
        EventLog(run, 1).emit(step_event(number, loss=1.0))
    assert len(watcher.progress(run).curves["loss"].steps) == 5
    run.events_file.unlink()
    EventLog(run, 1).emit(step_event(7, loss=1.0))
    assert watcher.progress(run).curves["loss"].points() == [(7, 1.0)]


def test_hundred_thousand_events_are_read_within_seconds(run: Run) -> None:
    line = {"schema": 1, "t": 1.0, "attempt": 1, "kind": "step", "lr": 1e-4, "grad_norm": 0.5,
            "tokens": 9, "tokens_per_second": 100.0, "memory": 10**9, "total_steps": 100_000,
            "seconds_left": 1.0}  # fmt: skip
    with open(run.events_file, "w") as file:
        for number in range(1, 100_001):
            file.write(json.dumps({**line, "step": number, "loss": number % 7}) + "\n")
    watcher = RunMonitor()
    started = time.process_time()
    while not (progress := watcher.progress(run)).is_complete:
        pass
    assert time.process_time() - started < 3.0
    assert len(progress.curves["loss"].points()) <= 600
    started = time.process_time()
    watcher.progress(run)
    assert time.process_time() - started < 0.05


# Summaries


def test_summary_has_the_newest_figures(run: Run) -> None:
    log = EventLog(run, 1)
    log.emit(PhaseStarted(name="training"))
    log.emit(evaluated_event(0, 2.75))
    for number in range(1, 2000):
        log.emit(step_event(number, loss=3.0))
    summary = RunMonitor().summary(run)
    assert (summary.name, summary.title) == (run.name, "quickstart")
    assert (summary.state.state, summary.stage) == ("finished", "done")
    assert (summary.step, summary.total_steps, summary.seconds_left) == (1999, 100, None)
    assert (summary.loss, summary.model, summary.rank, summary.rows) == (3.0, "embedded", 16, None)
    assert summary.seconds == pytest.approx(10 / 180)


def test_summary_names_the_stage_of_a_live_run(run: Run) -> None:
    log, held = EventLog(run, 2), locks.lock(run.path / "worker.lock")
    run.write_state("running", attempt=2)

    def stage() -> tuple[str, float | None, float | None]:
        summary = RunMonitor().summary(run)
        return summary.stage, summary.share, summary.seconds_left

    EventLog(run, 1).emit(step_event(50))  # of an attempt before
    assert stage() == ("prepare", None, None)
    log.emit(PhaseStarted(name="training"))
    log.emit(step_event(60))
    assert stage() == ("train", 0.6, 65.0)
    run.write_state("stopping")
    assert stage() == ("train", 0.6, None), "the time left is of a run that goes on"
    run.write_state("running")
    log.emit(step_event(100))
    log.emit(PhaseEnded(name="training", seconds=9.0))
    log.emit(PhaseStarted(name="comparison"))
    log.emit(Generated(side="after", done=3, total=7))
    assert stage() == ("measure", None, None), "it is not 100 % done"
    assert held
    held.close()


def test_training_of_which_the_tail_has_no_beginning_is_recognised(run: Run) -> None:
    run.write_state("stopped")
    EventLog(run, 1).emit(step_event(60))
    assert RunMonitor().summary(run).stage == "train"


def test_progress_adds_the_time_of_the_attempts_stages(run: Run) -> None:
    watcher = RunMonitor()
    for attempt in (1, 2):
        log = EventLog(run, attempt)
        for name, seconds in (("libraries", 1.0), ("data", 2.0), ("training", 5.0)):
            log.emit(PhaseStarted(name=name))
            log.emit(PhaseEnded(name=name, seconds=seconds))
    assert watcher.progress(run).stage_seconds == {"prepare": 3.0, "train": 5.0}


def test_finished_runs_heldout_loss_is_the_adapters(run: Run) -> None:
    finished = copy_finished(run.path.parent)
    report = finished.report()["eval"]["after"]
    assert RunMonitor().summary(finished).heldout_loss == report["loss"]


def test_summary_is_read_again_after_a_change(run: Run) -> None:
    watcher = RunMonitor()
    first = watcher.summary(run)
    assert watcher.summary(run) is first
    manager.set_title_and_notes(run, title="好名字", notes=" two\nlines ")
    assert watcher.summary(run).title == "好名字"
    assert run.about()["notes"] == "two\nlines"
    EventLog(run, 1).emit(step_event(4, loss=1.5))
    assert watcher.summary(run).step == 4


def test_damaged_notes_leave_the_folders_name_as_title(run: Run) -> None:
    for content in ("{", "[1]", '{"title": null}'):
        (run.path / "about.json").write_text(content)
        assert run.title() == run.name
