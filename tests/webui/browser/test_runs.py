"""The Runs tab in a browser: the list, a run's head and overview, charts, live updates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from in_browser import choose_tab, open_tab
from run_folders import copy_finished, evaluated_event, step_event
from served import Served
from workbench import LightRuns

from jetson_ft.runs import manager
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run

pytestmark = pytest.mark.slow
ACTIVE = "document.activeElement.id"
COLOURS = """Object.fromEntries([...document.querySelectorAll('#runs .swatch')].map((swatch) => [
  swatch.dataset.draw, getComputedStyle(swatch.firstElementChild).backgroundColor]))"""
CLEAR = "rgba(0, 0, 0, 0)"
AXIS = "Chart.getChart(document.querySelector('.plot canvas')).scales.x"


@pytest.fixture(scope="module", autouse=True)
def curves(runs: LightRuns) -> list[str]:
    """Return the names of three finished runs with curves, the newest first."""
    names = [f"2026020{number}-000000-curves" for number in (3, 2, 1)]
    for name in names:
        log = EventLog(copy_finished(runs.root, name), 1)
        for step in range(1, 41):
            log.emit(step_event(step, loss=4 / step, tokens=100 * step))
        log.emit(evaluated_event(40, 1.5))
    return names


def open_run(page: Any, served: Served, name: str, language: str = "en") -> None:
    """Open the Runs tab with a run."""
    page.goto(f"{served.base}/{language}/?run={name}#runs")
    page.locator("#run-head h2").wait_for()
    page.locator("#run-view > *").first.wait_for()


def wait_for_chart(page: Any) -> Any:
    """Return the first chart's element once it is drawn."""
    page.wait_for_function("window.Chart?.getChart(document.querySelector('.plot canvas'))")
    return page.locator(".plot").first


# --- what is fetched ---------------------------------------------------------------------------


def test_opening_the_tab_shows_the_runs_at_once_and_leaving_it_ends_the_polling(
    page: Any, served: Served
) -> None:
    open_tab(page, served, "train")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url.partition("/live/")[2]))
    choose_tab(page, "runs")
    page.locator("#runs li").first.wait_for(timeout=1500)  # before the next tick
    page.locator("#run-view .tile").first.wait_for(timeout=1500)
    assert not [url for url in requests if re.search("view=(samples|settings|log|export)", url)]
    choose_tab(page, "train")
    requests.clear()
    page.wait_for_timeout(3000)
    assert not any(requests)


def test_a_late_list_leaves_the_run_that_was_chosen_meanwhile(
    page: Any, served: Served, curves: list[str]
) -> None:
    """Where no run is chosen, the list's first one is, once the list is there."""
    late: list[Any] = []
    page.route("**/live/en/runs?chosen=&*", lambda route: late.append(route))
    with page.expect_request("**/live/en/runs?chosen=&*"):
        open_tab(page, served, "runs")
    page.evaluate(f"jetsonFt.choose('{curves[1]}')")
    page.locator(f"#run-head form[data-run='{curves[1]}']").wait_for(state="attached")
    with page.expect_response("**/live/en/runs?chosen=&*"):
        for route in late:
            route.continue_()
    page.wait_for_timeout(300)
    assert f"run={curves[1]}" in page.url


def test_update_keeps_focus_selection_and_what_is_open(
    page: Any, served: Served, curves: list[str], runs: LightRuns
) -> None:
    open_run(page, served, curves[0])
    page.get_by_text("All measurements").click()
    page.locator("#runs-filter").fill("curves")
    page.locator("#view-overview").focus()
    page.evaluate("window.kept = document.querySelector('details.measured')")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.run-facts'))")
    selected = page.evaluate("String(getSelection())")
    manager.set_title_and_notes(Run(runs.root / curves[0]), title="Another name")
    page.locator("#run-head h2").get_by_text("Another name").wait_for()
    page.locator("#runs .title").get_by_text("Another name").wait_for()
    assert page.evaluate(ACTIVE) == "view-overview"
    assert page.evaluate("String(getSelection())") == selected
    assert page.evaluate("kept.open && kept.isConnected")
    assert page.locator("#runs-filter").input_value() == "curves"
    assert page.locator("#runs li").count() == 3


def test_update_keeps_the_place_on_the_page(
    page: Any, served: Served, curves: list[str], runs: LightRuns
) -> None:
    page.set_viewport_size({"width": 390, "height": 500})
    open_run(page, served, curves[0])
    wait_for_chart(page)
    page.evaluate("scrollTo(0, 400)")
    page.wait_for_timeout(100)
    top = page.evaluate("scrollY")
    assert top > 100
    log = EventLog(Run(runs.root / curves[0]), 1)
    for step in range(41, 44):  # a longer summary, and one more title
        log.emit(step_event(step, loss=4 / step))
    manager.set_title_and_notes(Run(runs.root / curves[0]), title="A third name")
    page.locator("#run-head h2").get_by_text("A third name").wait_for()
    page.wait_for_function("document.querySelector('#summary-loss').innerText.includes('43')")
    assert page.evaluate("scrollY") == top


# --- list --------------------------------------------------------------------------------------


def test_filter_and_order_are_kept_over_a_reload(page: Any, served: Served) -> None:
    open_tab(page, served, "runs")
    page.locator("#runs-filter").fill("curves finished")
    page.locator("#runs-sort").select_option("name")
    page.wait_for_function("document.querySelectorAll('#runs li').length === 3")
    page.reload()
    page.wait_for_function("document.querySelectorAll('#runs li').length === 3")
    assert page.locator("#runs-sort").input_value() == "name"


def test_compared_runs_keep_their_colours(page: Any, served: Served, curves: list[str]) -> None:
    open_run(page, served, curves[0])
    for name in curves[1:]:
        page.locator(f"[data-draw='{name}']").click()
        page.locator(f"[data-draw='{name}'][aria-pressed=true]").wait_for()
    before = page.evaluate(COLOURS)
    assert len({before[name] for name in curves} - {CLEAR}) == 3
    page.locator(f"[data-choose='{curves[1]}']").click()
    page.locator(f"#runs .chosen[data-run='{curves[1]}']").wait_for()
    after = page.evaluate(COLOURS)
    assert [after[name] for name in curves[1:]] == [before[name] for name in curves[1:]]
    assert after[curves[0]] == CLEAR, "it was shown and not compared"
    wait_for_chart(page)
    page.wait_for_function("document.querySelectorAll('.legend span').length === 3")
    page.reload()
    page.locator(f"[data-draw='{curves[2]}'][aria-pressed=true]").wait_for()
    assert page.evaluate(COLOURS) == after


# --- head --------------------------------------------------------------------------------------


def test_arrow_keys_choose_the_view(page: Any, served: Served, curves: list[str]) -> None:
    open_run(page, served, curves[0])
    page.locator("#view-overview").focus()
    for key, view in (("ArrowRight", "samples"), ("End", "export"), ("ArrowLeft", "log")):
        with page.expect_response(re.compile(rf"/live/en/runs/{curves[0]}\?.*view={view}")):
            page.keyboard.press(key)
        assert page.evaluate(ACTIVE) == f"view-{view}"
    assert page.locator("#run-view").get_attribute("aria-labelledby") == "view-log"
    assert page.locator("#run-head [role=tab][tabindex='0']").count() == 1
    page.get_by_role("button", name="Export", exact=True).click()
    page.locator("#view-export[aria-selected=true]").wait_for()


def test_states_are_told_apart(page: Any, served: Served, runs: LightRuns) -> None:
    open_tab(page, served, "runs")
    page.locator("#runs .state.failed").first.wait_for()
    assert "next in the queue" in page.locator("#runs .state.queued").inner_text()
    page.locator("#runs li", has=page.locator(".state.failed")).locator(".pick").click()
    page.locator("#run-head .fault b").wait_for()
    assert page.locator(".stages .ended").count() == 1
    assert page.locator("#run-page .do.primary").count() == 1
    page.wait_for_function("document.title.includes(' · jetson-ft')")  # one is live


# --- charts ------------------------------------------------------------------------------------


def test_chart_shows_values_enlarges_and_changes_its_axis(
    page: Any, served: Served, curves: list[str]
) -> None:
    open_run(page, served, curves[2])
    plot = wait_for_chart(page)
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    values = plot.locator(".chart-box")
    values.wait_for()
    assert re.search(r"Step 2\d\s+training", values.inner_text())
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=3)
    page.mouse.up()
    low, high = page.evaluate(f"[{AXIS}.min, {AXIS}.max]")
    assert 15 < low < 25 and 28 < high < 36
    plot.dblclick()
    assert page.evaluate(f"{AXIS}.min") == 0 and page.locator("#chart-reset").is_hidden()
    page.locator("#chart-axis").select_option("tokens")
    assert page.evaluate(f"{AXIS}.max") >= 4000
    page.locator("#chart-axis").select_option("seconds")
    assert page.evaluate(f"{AXIS}.ticks.at(-1).label").endswith(" s")


def test_chart_is_read_with_the_keyboard(page: Any, served: Served, curves: list[str]) -> None:
    open_run(page, served, curves[2])
    plot = wait_for_chart(page)
    plot.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert "Step 39" in plot.locator(".chart-box").inner_text()
    page.keyboard.press("Tab")  # to the values as a table
    page.keyboard.press("Enter")
    table = page.locator(".chart-values table")
    table.wait_for()
    assert table.locator("tr").last.inner_text().split() == ["40", "0.1", "1.5"]
    assert "From 4 at step 1" in page.locator("#summary-loss").inner_text()


def test_cursor_is_in_all_charts(page: Any, served: Served, curves: list[str]) -> None:
    open_run(page, served, curves[2])
    page.locator("#view-charts").click()
    page.locator("#plot-lr canvas").wait_for()
    page.locator("#plot-lr").hover()
    page.locator("#plot-memory .chart-box:visible").wait_for()
    assert page.locator(".chart-box:visible").count() == page.locator(".plot").count() == 4


# --- the end of a run --------------------------------------------------------------------------


@pytest.fixture
def live(runs: LightRuns) -> Iterator[Run]:
    """Return a run that is live until the test ends it."""
    run = runs.launch("ends-soon")
    yield run
    manager.stop(run)


@pytest.mark.parametrize("is_android", [False, True])
def test_a_person_is_notified_once_they_asked(
    page: Any, served: Served, live: Run, is_android: bool
) -> None:
    """Chrome on Android has the class, and its constructor throws: then the page has a notice."""
    page.add_init_script(
        """
      window.notices = [];
      window.Notification = class { static permission = "default";
        static async requestPermission() { return (this.permission = "granted"); }
        constructor(title, { body }) {
          if (IS_ANDROID) throw new TypeError("Illegal constructor.");
          notices.push([title, body]);
        } };
    """.replace("IS_ANDROID", json.dumps(is_android))
    )
    open_tab(page, served, "runs")
    bell = page.locator("#runs-notify")
    bell.click()
    page.locator("#runs-notify[aria-pressed=true]").wait_for()
    page.locator(f"#runs .live[data-run='{live.name}']").wait_for()
    page.wait_for_timeout(300)
    manager.stop(live)
    if is_android:
        page.get_by_role("alert").get_by_text("ends-soon: stopped").wait_for(timeout=20_000)
    else:
        page.wait_for_function("notices.length", timeout=20_000)
        assert page.evaluate("notices") == [["ends-soon", "stopped"]]
    bell.click()
    assert json.loads(bell.get_attribute("aria-pressed")) is False
