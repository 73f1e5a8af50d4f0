"""WCAG 2.2 A and AA, as far as axe-core can check it, over every tab, state, scheme and width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_browser import TABS, choose_tab, open_tab
from served import Serve, Served
from workbench import LightRuns

from jetson_ft.runs import store

axe_playwright = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)
pytestmark = pytest.mark.slow
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
# What Gradio causes and no style or script of ours can change: rule -> the reason.
EXCEPTIONS: dict[str, str] = {}
ALL_LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (1440, 390)]
LOOKS = [("light", 1440), ("dark", 390)]  # each scheme and each width once


def assert_accessible(page: Any, state: str, looks: Any = LOOKS) -> None:
    """Fail with the rule, the element and what axe says, for each violation in any look."""
    violations: list[str] = []
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    for scheme, width in looks:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(100)
        for rule in axe_playwright.Axe().run(page, options=RULES).response["violations"]:
            if rule["id"] not in EXCEPTIONS:
                violations += [
                    f"{state}, {scheme}, {width}: {rule['id']}: {node['target']}\n"
                    f"  {node['html'][:200]}\n  {node['failureSummary']}"
                    for node in rule["nodes"]
                ]
    assert not violations, "\n".join(violations)


def test_every_tab(page: Any, served: Served) -> None:
    open_tab(page, served)
    for tab in TABS:
        choose_tab(page, tab)
        page.wait_for_timeout(1000)
        assert_accessible(page, tab, ALL_LOOKS)


def test_the_form_unfolded_with_mistakes(page: Any, served: Served) -> None:
    open_tab(page, served)
    for group in page.locator(".gr-accordion > button").all():
        group.click()
    page.locator("#field-lora-rank input").fill("0")
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator(".mistake").first.wait_for()
    assert_accessible(page, "mistakes")
    page.get_by_text("My files", exact=True).click()
    assert_accessible(page, "my files")


def test_runs_in_every_state_and_view(page: Any, served: Served, runs: LightRuns) -> None:
    for run in store.list_runs(runs.root):
        page.goto(f"{served.base}/en/?run={run.name}#runs")
        page.locator("#run-view > *").first.wait_for()
        assert_accessible(page, run.state().state)
    for view in page.locator("[role=tab][id^=view-]").all():  # of the last one, which is finished
        view.click()
        page.wait_for_timeout(500)
        assert_accessible(page, f"view {view.inner_text()}")
    page.get_by_role("button", name="Delete").first.click()
    page.get_by_role("dialog").wait_for()
    assert_accessible(page, "dialog")


def test_without_runs(page: Any, empty: Served) -> None:
    open_tab(page, empty, "runs")
    page.wait_for_timeout(1000)
    assert_accessible(page, "no runs")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a server without runs."""
    server = Served(tmp_path_factory.mktemp("empty"))
    yield server
    server.kill()


def test_the_login(page: Any, serve: Serve) -> None:
    page.goto(serve("--host", "0.0.0.0").base)
    assert_accessible(page, "login", ALL_LOOKS)
