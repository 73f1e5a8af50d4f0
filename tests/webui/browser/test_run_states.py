"""What the page shows of a run's state: a failed one, what a live one does, and how it ends."""

from __future__ import annotations

import signal
from typing import Any

import psutil
import pytest
from in_browser import open_tab
from run_folders import step_event
from served import Served
from workbench import LightRuns

from jetson_ft import events
from jetson_ft.runs import manager, store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow(minutes=0.5)
expect = sync_api.expect
TIMEOUT = 15_000  # milliseconds; other tests share the machine
# Delays of at most half a second, so that what is fetched every ten seconds is soon fetched again.
QUICK = """const later = window.setTimeout;
window.setTimeout = (action, ms, ...rest) => later(action, Math.min(ms ?? 0, 500), ...rest);"""
HIDING = "Object.defineProperty(document, 'hidden', { get: () => window.isAway ?? false });"


@pytest.fixture
def live(runs: LightRuns) -> Run:
    """Return a run that trains, with more than a minute to go."""
    (run,) = [run for run in store.list_runs(runs.root) if "endless" in run.name]
    if manager.reconcile_state(run) == "stopped":  # by another test
        manager.resume(run)
    runs.worker(run)
    emit(run, events.PhaseStarted(name="training"), step_event(42, seconds_left=65.0))
    return run


def emit(run: Run, *made: events.Event) -> None:
    """Append events of the run's present attempt."""
    with EventLog(run, run.state().attempt) as log:
        for event in made:
            log.emit(event)


def open_run(page: Any, served: Served, name: str) -> Any:
    """Open the Runs tab with a run; return its item in the list."""
    page.goto(f"{served.base}/en/?run={name}#runs")
    page.locator(f"#run-head form[data-run='{name}']").wait_for(state="attached")
    return page.locator(f"#runs li[data-run='{name}']")


def test_a_failed_run_shows_its_fix(page: Any, served: Served, runs: LightRuns) -> None:
    (failed,) = [run for run in store.list_runs(runs.root) if run.state().state == "failed"]
    item = open_run(page, served, failed.name)
    fault = page.locator("#run-head .fault")
    expect(fault.locator("b")).to_have_text("No such file.")
    expect(fault.locator("p").first).to_have_text("Check the path.")
    expect(fault.locator("p.small")).to_have_text("rows.json")
    expect(item.locator(".state")).to_contain_text("failed")
    expect(page.locator("#run-head .pill")).to_have_css("border-top-width", "1px")


def test_the_title_has_the_share_of_a_live_run(page: Any, served: Served, live: Run) -> None:
    item = open_run(page, served, live.name)
    expect(page).to_have_title("42 % · jetson-ft", timeout=TIMEOUT)
    expect(item.locator(".state")).to_contain_text("42% · 1 min 05 s left")
    expect(page.locator("#run-head [role=progressbar]")).to_have_attribute("aria-valuenow", "42")


def test_the_title_goes_on_after_a_busy_server(page: Any, served: Served, live: Run) -> None:
    page.add_init_script(QUICK)
    answers = iter((429, 401))

    def refuse(route: Any) -> None:
        status = next(answers, 0)
        route.fulfill(status=status, json={"what": "busy"}) if status else route.continue_()

    page.route("**/progress/en*", refuse)
    open_tab(page, served)
    expect(page).to_have_title("42 % · jetson-ft", timeout=TIMEOUT)
    assert next(answers, 0) == 0


def test_a_run_that_measures_shows_that(page: Any, served: Served, live: Run) -> None:
    """All its steps are made, which is not all its work."""
    item = open_run(page, served, live.name)
    expect(page.locator("#run-head .pill")).to_have_text("training")
    emit(
        live, step_event(100), events.PhaseEnded(name="training", seconds=1.0),
        events.PhaseStarted(name="comparison"), events.Generated(side="after", done=3, total=10),
    )  # fmt: skip
    expect(page.locator("#run-head .pill")).to_have_text("measuring")
    expect(item.locator(".state")).to_have_text("measuring")
    expect(page.locator("#run-head .work")).to_contain_text("adapter, replies: 3 of 10")
    expect(page.locator("#run-head [role=progressbar]")).to_have_count(0)
    expect(page.locator("#run-head [aria-current=step]")).to_contain_text("Measure")
    assert "100" not in page.locator("#run-head").inner_text() + item.inner_text()
    page.reload()
    expect(page).to_have_title("measuring · jetson-ft", timeout=TIMEOUT)


# --- what is fetched, and when that fails -------------------------------------------------------


def test_a_window_in_the_background_fetches_nothing(page: Any, served: Served, live: Run) -> None:
    page.add_init_script(HIDING)
    open_run(page, served, live.name)
    page.evaluate("isAway = true; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(500)  # for what is under way
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.wait_for_timeout(3000)
    assert [url for url in requests if "/live/" in url] == []
    with page.expect_request("**/live/en/runs*", timeout=1500):  # before the next tick
        page.evaluate("isAway = false; document.dispatchEvent(new Event('visibilitychange'))")


def test_an_action_without_a_server_is_reported_and_can_be_repeated(
    page: Any, served: Served, live: Run
) -> None:
    open_run(page, served, live.name)
    page.route("**/stop", lambda route: route.abort())
    stop = page.locator("#run-head [data-do=stop]")
    stop.click()
    toast = page.get_by_role("alert").filter(has_text="The page's server doesn't respond.")
    toast.wait_for()
    expect(stop).to_be_enabled()


# --- the end ------------------------------------------------------------------------------------


def test_a_run_that_stops_shows_no_old_time_left(
    page: Any, served: Served, live: Run, runs: LightRuns
) -> None:
    """And each state is read out: the element with the state is a live region that stays."""
    item = open_run(page, served, live.name)
    state = page.locator("#run-head [role=status]")
    expect(item.locator(".state")).to_contain_text("left")
    expect(page.locator("#run-head .work")).to_contain_text("left")
    shown = state.element_handle()
    worker = psutil.Process(runs.worker(live))
    worker.send_signal(signal.SIGSTOP)  # it stays in the middle of a step
    try:
        page.locator("#run-head [data-do=stop]").click()
        expect(state).to_have_text("stopping", timeout=TIMEOUT)
        expect(page.locator("#run-head .work")).to_have_text("writing a checkpoint")
        expect(item.locator(".state")).to_contain_text("stopping")
        assert "left" not in page.locator("#run-page").inner_text()
        expect(page.locator("#run-head [data-do=stop]")).to_have_count(0)
    finally:
        worker.send_signal(signal.SIGCONT)
    expect(state).to_have_text("stopped", timeout=TIMEOUT)
    assert shown.evaluate("pill => pill.isConnected && pill.textContent") == "stopped"
    expect(page.locator("#run-head [data-do=resume]")).to_be_visible()
