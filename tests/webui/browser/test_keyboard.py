"""A run is set up, started, watched and stopped with the keyboard alone."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect
from served import Served
from workbench import LightRuns

from jetson_ft.runs.store import list_runs

pytestmark = pytest.mark.slow
MAX_PRESSES = 80


def move_to(page: Any, target: Any, key: str = "Tab") -> None:
    """Press a key until the target has the focus."""
    for _press in range(MAX_PRESSES):
        if target.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{target} is not reached with {key}")


def test_a_run_is_set_up_started_and_stopped(page: Any, served: Served, runs: LightRuns) -> None:
    page.set_default_timeout(20_000)
    page.goto(f"{served.base}/en/")
    cards = page.locator("#train input[name=recipe]")
    expect(cards.first).to_be_checked()
    move_to(page, page.get_by_role("tab", name="Train", exact=True))
    move_to(page, cards.first)
    page.keyboard.press("ArrowDown")
    expect(cards.nth(1)).to_be_checked()
    page.keyboard.press("ArrowUp")
    rank = page.locator("#field-lora-rank input")
    move_to(page, rank)
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("4")
    start = page.get_by_role("button", name="Start", exact=True)
    expect(page.locator("#train")).to_contain_text("lora.rank=4")
    move_to(page, start)
    before = {run.name for run in list_runs(runs.root)}
    page.keyboard.press("Enter")

    detail = page.locator("#run-detail")
    expect(detail.locator(".pill.queued")).to_be_visible()
    (run,) = [each for each in list_runs(runs.root) if each.name not in before]
    assert run.recipe().lora.rank == 4
    expect(page.get_by_role("tab", name="Runs", exact=True)).to_have_attribute(
        "aria-selected", "true"
    )
    move_to(page, detail.get_by_role("button", name="Stop", exact=True))
    page.keyboard.press("Enter")
    expect(detail.locator(".pill.stopped")).to_be_visible()
    overview = detail.get_by_role("tab", name="Overview")
    move_to(page, overview)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(detail.get_by_role("tab", name="Settings")).to_be_focused()
    expect(detail.locator("#run-view")).to_contain_text("Learning rate")
    delete = detail.get_by_role("button", name="Delete", exact=True)
    move_to(page, delete, "Shift+Tab")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert run.path.is_dir()
