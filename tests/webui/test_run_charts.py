"""The curves of runs for the browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import make_run, step_event

from jetson_ft.runs.event_log import EventLog
from jetson_ft.webui import run_charts
from jetson_ft.webui.fragments import Fragments


def test_curves_of_a_view_come_with_what_the_axes_need(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000-x", steps=0)
    log = EventLog(run, 1)
    for step in (1, 2):
        log.emit(step_event(step, loss=3.0 - step, tokens=100 * step, tokens_per_second=50.0))
    shown = Fragments(tmp_path)
    (overview,) = json.loads(shown.curves("overview", ("", "", run.name)))
    assert (overview["name"], overview["title"], overview["colour"]) == (run.name, "x", 2)
    assert overview["curves"]["loss"] == [[1, 2], [2.0, 1.0]]
    assert overview["curves"]["tokens"] == [[1, 2], [100, 200]]
    assert overview["curves"]["seconds"] == [[1, 2], [2.0, 4.0]]
    (charts,) = json.loads(shown.curves("charts", (run.name, "deleted since")))
    assert "loss" not in charts["curves"] and charts["curves"]["memory"] == [[1, 2], [2.0, 2.0]]


def test_a_long_run_is_sent_with_a_thousand_points_at_most(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000-x", steps=4000)
    (sent,) = json.loads(Fragments(tmp_path).curves("overview", (run.name,)))
    steps, losses = sent["curves"]["loss"]
    assert len(steps) == len(losses) <= 1000 and losses[0] == 3.0


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_charts_are_described_in_words(tmp_path: Path, language: str) -> None:
    run = make_run(tmp_path, "20260101-000000-x")
    html = Fragments(tmp_path).run_view(language, run.name, "overview", (run.name,), {})
    text = {"en": "From 3 at step 1 to 1 at step 3", "zh_CN": "从第 1 步的 3 到第 3 步的 1"}
    assert text[language] in html


def test_chart_js_is_served_from_its_package() -> None:
    assert b"Chart.js v4" in Path(run_charts.library().path).read_bytes()[:100]


def test_runs_of_one_title_are_told_apart_by_their_names(tmp_path: Path) -> None:
    names = ["20260101-000000-x", "20260101-000001-x", "20260101-000002-y"]
    for name in names:
        make_run(tmp_path, name)
    sent = json.loads(Fragments(tmp_path).curves("overview", tuple(names)))
    assert [run["title"] for run in sent] == [*names[:2], "y"]
