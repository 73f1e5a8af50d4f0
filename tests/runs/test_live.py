"""Curves and summaries from events as they grow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.runs import live, shelf
from jetson_ft.runs.live import Curve, Watcher
from jetson_ft.runs.rundir import EventLog, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "20260101-000000-quickstart"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("version: 1\n")
    made = Run(folder)
    made.write_state("finished")
    return made


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": loss, "total_steps": 100, "seconds_left": 5.0, **more}


# Curves

told = st.lists(st.tuples(st.integers(0, 40), st.floats(-10, 10)))


@given(told)
def test_the_last_word_on_a_step_counts_and_steps_ascend(pairs: list[tuple[int, float]]) -> None:
    curve = Curve()
    for number, value in pairs:
        curve.add(number, value)
    assert curve.points() == sorted(dict(pairs).items())


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(2, 40))
def test_few_points_keep_lows_and_highs(values: list[float], at_most: int) -> None:
    curve = Curve()
    for number, value in enumerate(values):
        curve.add(number, value)
    points = curve.points(at_most)
    assert len(points) <= max(at_most, 2)
    assert points == sorted(points, key=lambda point: point[0])
    assert {min(values), max(values)} <= {value for _, value in points}


# Watching


def test_events_are_followed_as_they_come(run: Run) -> None:
    watcher, log = Watcher(), EventLog(run, 1)
    assert watcher.seen(run).curves == {}
    log.emit("phase", name="training", detail="")
    log.emit("step", **step(1, 3.0))
    seen = watcher.seen(run)
    assert seen.phase == "training" and seen.curves["loss"].points() == [(1, 3.0)]
    log.emit("step", **step(2, float("nan")))
    log.emit("step", **step(3, 2.0))
    log.emit("eval", step=3, heldout_loss=2.5)
    with open(run.events_file, "a") as file:
        file.write('{"kind": "step", "half a li')
    seen = watcher.seen(run)
    assert seen.curves["loss"].points() == [(1, 3.0), (3, 2.0)]
    assert seen.curves["heldout_loss"].points() == [(3, 2.5)]


def test_steps_made_again_replace_the_old_ones(run: Run) -> None:
    watcher = Watcher()
    for attempt, losses in ((1, {1: 3.0, 2: 9.0}), (2, {2: 2.0, 3: 1.0})):
        log = EventLog(run, attempt)
        for number, loss in losses.items():
            log.emit("step", **step(number, loss))
    assert watcher.seen(run).curves["loss"].points() == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_run_made_anew_under_the_same_name_is_read_anew(run: Run) -> None:
    watcher = Watcher()
    for number in range(5):
        EventLog(run, 1).emit("step", **step(number, 1.0))
    assert len(watcher.seen(run).curves["loss"]) == 5
    run.events_file.unlink()
    EventLog(run, 1).emit("step", **step(7, 1.0))
    assert watcher.seen(run).curves["loss"].points() == [(7, 1.0)]


def test_a_hundred_thousand_events_are_drawn_within_a_second(run: Run) -> None:
    line = {"schema": 1, "t": 1.0, "attempt": 1, "kind": "step", "lr": 1e-4, "grad_norm": 0.5,
            "tokens": 9, "tokens_per_second": 100.0, "memory": 10**9}  # fmt: skip
    with open(run.events_file, "w") as file:
        for number in range(100_000):
            file.write(json.dumps({**line, "step": number, "loss": number % 7}) + "\n")
    watcher = Watcher()
    started = time.process_time()
    points = watcher.seen(run).curves["loss"].points()
    assert time.process_time() - started < 1.0 and len(points) <= 600
    started = time.process_time()
    watcher.seen(run)
    assert time.process_time() - started < 0.05


# Summaries


def test_a_summary_tells_where_a_run_is(run: Run) -> None:
    log = EventLog(run, 1)
    log.emit("phase", name="training", detail="")
    log.emit("eval", step=0, heldout_loss=2.75)
    for number in range(1, 2000):
        log.emit("step", **step(number, 3.0))
    found = Watcher().summary(run)
    assert (found.name, found.title, found.state.state) == (run.name, run.name, "finished")
    assert (found.step, found.total_steps, found.seconds_left, found.loss) == (1999, 100, 5.0, 3.0)


def test_a_summary_is_made_again_when_something_changed(run: Run) -> None:
    watcher = Watcher()
    first = watcher.summary(run)
    assert watcher.summary(run) is first
    shelf.describe(run, title="好名字", notes=" two\nlines ")
    assert watcher.summary(run).title == "好名字"
    assert live.about(run)["notes"] == "two\nlines"
    EventLog(run, 1).emit("step", **step(4, 1.5))
    assert watcher.summary(run).step == 4


def test_a_damaged_note_hides_nothing(run: Run) -> None:
    for content in ("{", "[1]", '{"title": null}'):
        (run.path / live.ABOUT).write_text(content)
        assert live.title(run) == run.name
