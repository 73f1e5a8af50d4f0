"""The Inside tab in a browser: each view is opened and drawn."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from in_browser import choose_tab
from served import Served
from workbench import LightRuns

from jetson_ft.webui.tabs.inside import PANELS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow(minutes=0.5)
RUN = "20260101-000000-finished"
TIMEOUT = 60_000  # milliseconds; other tests share the machine


@pytest.fixture(scope="module", autouse=True)
def base(runs: LightRuns) -> None:
    """Put the base of the finished run where its recipe names it."""
    stored = Path(__file__).parents[2] / "versions" / "1" / "model"
    shutil.copytree(stored, runs.root.parent / "model")


def test_every_view_is_drawn(page: Any, served: Served) -> None:
    page.goto(f"{served.base}/en/#inside")
    page.locator("#inside-form select").select_option(RUN)
    for name, panel in PANELS.items():
        page.locator(f"#inside-form input[value={name}]").check(force=True)
        if name == "tokens":  # chosen from the start
            page.get_by_role("button", name="Show").click()
        views = page.locator("#inside-views article.inside")
        sync_api.expect(views).to_have_count(len(panel.views), timeout=TIMEOUT)
        assert page.locator("#inside-error").inner_text() == ""
    sync_api.expect(page.locator("#inside-views h2")).to_have_text("The adapter")


def test_a_slider_draws_the_distribution_again(page: Any, served: Served) -> None:
    page.goto(f"{served.base}/en/#inside")
    page.locator("#inside-form select").select_option(RUN)
    page.locator("#inside-form input[value=next]").check(force=True)
    kept = page.locator("#inside-views table tbody tr").filter(has_text="top-k").locator("td").first
    sync_api.expect(kept).to_have_text("12", timeout=TIMEOUT)
    page.get_by_label(re.compile("Top-k")).fill("3")
    sync_api.expect(kept).to_have_text("3", timeout=TIMEOUT)
    page.locator("#inside-form select[name=model]").evaluate("box => { box.value = 'nothing' }")
    page.get_by_role("button", name="Show").click()
    sync_api.expect(page.locator("#inside-error")).not_to_be_empty(timeout=TIMEOUT)


def test_requests_that_fail_are_reported_and_made_again(page: Any, served: Served) -> None:
    page.route("**/live/en/inside", lambda route: route.abort(), times=1)
    page.goto(f"{served.base}/en/#inside")
    message = "The page's server doesn't respond."
    sync_api.expect(page.locator("#inside-page")).to_contain_text(message)
    choose_tab(page, "runs")
    choose_tab(page, "inside")
    page.route("**/inside/*", lambda route: route.abort(), times=1)
    page.get_by_role("button", name="Show").click()
    sync_api.expect(page.locator("#inside-error")).to_contain_text(message)
    sync_api.expect(page.locator("#inside-status")).to_be_empty()
