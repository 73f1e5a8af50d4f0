"""What a chart draws: whose curves, in which colours, and how smooth."""

from __future__ import annotations

from typing import Any

import pytest
from run_folders import copy_finished, evaluated_event, step_event
from served import Served
from workbench import LightRuns

from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow
expect = sync_api.expect
ONE, OTHER, THIRD = NAMES = [f"2026030{number}-000000-curves-{number}" for number in (1, 2, 3)]
CHART = "window.Chart?.getChart(document.querySelector('.plot canvas'))"
STROKES = f"{CHART}.data.datasets.filter(set => !set.borderDash).map(set => set.borderColor)"
# The training loss without smoothing, at the second step: 9 / the run's number / 2.
SECOND = f"{CHART}?.data.datasets.find(set => set.borderWidth === 2).data[1].y"
LATER = 15_000  # milliseconds; other tests share the machine


@pytest.fixture(scope="module", autouse=True)
def curves(runs: LightRuns) -> None:
    """Make three finished runs whose losses differ."""
    for number, name in enumerate(NAMES, start=1):
        run = copy_finished(runs.root, name)
        (run.path / "about.json").unlink()  # its title; now it is called as its folder
        log = EventLog(Run(run.path), 1)
        for step in range(1, 41):
            log.emit(step_event(step, loss=9 / number / step, tokens=100 * step))
        log.emit(evaluated_event(40, 1.5))


@pytest.fixture
def shown(page: Any, served: Served) -> Any:
    """Return the page with the first run shown and no smoothing."""
    page.goto(f"{served.base}/en/")
    page.evaluate("sessionStorage.setItem('jetson-ft-charts', JSON.stringify({ smoothing: 0 }))")
    choose(page, served, ONE)
    return page


def choose(page: Any, served: Served, name: str) -> None:
    page.goto(f"{served.base}/en/?run={name}#runs")
    page.locator(f"#run-head form[data-run='{name}']").wait_for(state="attached")


def wait_for_curve(page: Any, name: str) -> None:
    page.wait_for_function(curve_is(name))


def curve_is(name: str) -> str:
    return f"{SECOND} === {9 / (1 + NAMES.index(name)) / 2}"


def test_a_late_answer_draws_nothing(shown: Any) -> None:
    """The curves of the run before must not come onto the page of the one that is shown."""
    wait_for_curve(shown, ONE)
    late: list[Any] = []
    shown.route(f"**/curves?*{OTHER}*", lambda route: late.append(route))
    with shown.expect_request(f"**/curves?*{OTHER}*"):
        shown.locator(f"#runs [data-choose='{OTHER}']").click()
    shown.locator(f"#runs [data-choose='{THIRD}']").click()
    wait_for_curve(shown, THIRD)
    with shown.expect_response(f"**/curves?*{OTHER}*"):
        for route in late:
            route.continue_()
    shown.wait_for_timeout(300)
    assert shown.evaluate(curve_is(THIRD))


def test_curves_that_did_not_arrive_are_fetched_again(page: Any, served: Served) -> None:
    """The next refresh of a finished run's view has nothing new."""
    page.route("**/curves?*", lambda route: route.abort(), times=1)
    with page.expect_event("requestfailed"):
        choose(page, served, ONE)
    page.wait_for_function(f"{CHART}?.data.datasets.length === 3", timeout=LATER)


def test_curves_of_compared_runs_differ_in_colour(shown: Any) -> None:
    for name in (OTHER, THIRD):
        shown.locator(f"[data-draw='{name}']").click()
        shown.locator(f"[data-draw='{name}'][aria-pressed=true]").wait_for()
    shown.wait_for_function(f"{CHART}?.data.datasets.length === 6")
    strokes = shown.evaluate(STROKES)
    assert len(set(strokes)) == 3
    listed = [shown.locator(f"[data-draw='{name}'] i") for name in NAMES]
    named = [
        shown.locator(".legend span", has_text=f"curves-{number}").locator("i")
        for number in (1, 2, 3)
    ]
    for marks, style in ((listed, "backgroundColor"), (named, "borderTopColor")):
        assert [
            mark.evaluate(f"mark => getComputedStyle(mark).{style}") for mark in marks
        ] == strokes


def test_smoothing_changes_the_curve_and_not_its_values(shown: Any) -> None:
    wait_for_curve(shown, ONE)
    assert len(shown.evaluate(STROKES)) == 1
    shown.locator("#chart-smoothing").fill("0.9")
    assert len(shown.evaluate(STROKES)) == 2, "what was measured stays, pale"
    pale, smooth = (
        shown.evaluate(f"{CHART}.data.datasets.find(set => set.borderWidth === {width}).data")
        for width in (1, 2)
    )
    assert pale[1]["y"] == 4.5
    # By the definition: (0.9 * 0.1 * 9 + 0.1 * 4.5) / (1 - 0.9 ** 2).
    assert smooth[0]["y"] == pytest.approx(9) and smooth[1]["y"] == pytest.approx(1.26 / 0.19)
    plot = shown.locator(".plot").first
    plot.focus()
    shown.keyboard.press("Home")
    shown.keyboard.press("ArrowRight")
    expect(plot.locator(".chart-box")).to_contain_text("training 4.5")
    shown.reload()
    expect(shown.locator("#chart-smoothing")).to_have_value("0.9", timeout=LATER)
