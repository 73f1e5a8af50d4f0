"""WCAG 2.2 A and AA, as far as axe-core can check it, over every tab, state, scheme and width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_browser import TABS, choose_tab, open_tab
from served import Served
from workbench import LightRuns

from jetson_ft.runs import store

axe_playwright = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)
pytestmark = pytest.mark.slow
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
# What Gradio causes and no style or script of ours can change: rule -> the reason.
EXCEPTIONS: dict[str, str] = {}
LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (1440, 390)]


def assert_accessible(page: Any, state: str) -> None:
    """Fail with the rule, the element and what axe says, for each violation."""
    page.wait_for_timeout(300)  # transitions of colours end
    violated = axe_playwright.Axe().run(page, options=RULES).response["violations"]
    violations = [
        f"{state}: {rule['id']}: {node['target']}\n  {node['html'][:200]}\n"
        f"  {node['failureSummary']}"
        for rule in violated
        if rule["id"] not in EXCEPTIONS
        for node in rule["nodes"]
    ]
    assert not violations, "\n".join(violations)


@pytest.fixture(params=LOOKS, ids=lambda look: "-".join(map(str, look)))
def look(request: pytest.FixtureRequest, browser: Any) -> Callable[[], Any]:
    """Return a function that opens a page in one scheme and width."""
    scheme, width = request.param
    return lambda: browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=scheme, locale="en-GB"
    )


def test_every_tab(look: Callable[[], Any], served: Served) -> None:
    page = look()
    open_tab(page, served)
    for tab in TABS:
        choose_tab(page, tab)
        page.wait_for_timeout(1000)
        assert_accessible(page, tab)


def test_runs_in_every_state(look: Callable[[], Any], served: Served, runs: LightRuns) -> None:
    page = look()
    for run in store.list_runs(runs.root):
        page.goto(f"{served.base}/en/?run={run.name}#runs")
        page.locator("#run-detail h2").wait_for()
        assert_accessible(page, run.state().state)


def test_without_runs(look: Callable[[], Any], empty: Served) -> None:
    page = look()
    open_tab(page, empty, "runs")
    page.wait_for_timeout(1000)
    assert_accessible(page, "no runs")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a server without runs."""
    server = Served(tmp_path_factory.mktemp("empty"))
    yield server
    server.kill()


def test_the_login(look: Callable[[], Any], tmp_path: Path) -> None:
    server = Served(tmp_path, "--host", "0.0.0.0")
    page = look()
    page.goto(server.base)
    assert_accessible(page, "login")
    server.kill()
