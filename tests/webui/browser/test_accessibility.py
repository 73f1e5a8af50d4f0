"""WCAG 2.2 A and AA, as far as axe-core can check it, over every tab, state, scheme and width."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from in_browser import TABS, choose_tab, open_tab
from program import invoke
from run_folders import copy_finished
from scripted_chat import SITE
from served import Serve, Served
from workbench import LightRuns, change_children

from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor.finding import failure, warning
from jetson_ft.runs import store
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs.device import fix_parts
from jetson_ft.webui.tabs.inside import PANELS

axe_playwright = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
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


def test_the_rows_and_a_plan_that_does_not_fit(page: Any, served: Served, tmp_path: Path) -> None:
    open_tab(page, served)
    page.get_by_text("My files", exact=True).click()
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("question,answer\n" + "q,a\n" * 8)
        page.set_input_files("#upload input[type=file]", str(tmp_path / name))
        page.locator(".sources", has_text=name).wait_for()
    page.get_by_role("checkbox", name="As the model reads them").wait_for(timeout=60_000)
    assert_accessible(page, "sources and rows")
    page.get_by_role("checkbox", name="As the model reads them").check()
    assert_accessible(page, "tokens")
    page.evaluate("jetsonFt.setFields({'train.max_memory_gb': 0.9})")
    page.get_by_role("button", name="Work out the plan now").click()
    page.locator("#plan .no").wait_for(timeout=60_000)
    for summary in page.locator(".command summary").all():
        summary.click()
    page.wait_for_timeout(500)
    assert_accessible(page, "won't fit")


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


def test_a_comparison_in_the_chat_and_its_drawers(page: Any, scripted: Served) -> None:
    open_tab(page, scripted, "chat")
    page.locator("#chat-a label", has_text="finished").wait_for()
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="(base)").first.click()
    page.locator("#chat-b label").first.wait_for()
    for number, text in enumerate(("code", "long"), 1):
        page.get_by_role("textbox", name="Message").fill(text)
        page.keyboard.press("Enter")
        page.locator(f":nth-match(#chat-b .bot-row[data-note*=tokens], {number})").wait_for()
    assert_accessible(page, "two answers", ALL_LOOKS)
    page.set_viewport_size({"width": 1440, "height": 900})
    for drawer in ("History", "Settings"):
        page.get_by_role("button", name=drawer).click()
        page.get_by_role("heading", name=drawer).wait_for()
        assert_accessible(page, drawer, ALL_LOOKS)
        page.keyboard.press("Escape")


def test_without_runs(page: Any, empty: Served) -> None:
    open_tab(page, empty, "runs")
    page.wait_for_timeout(1000)
    assert_accessible(page, "no runs")


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve) -> Served:
    """Return a server of one run, with answers of a script in place of a model."""
    copy_finished(tmp_path / "runs")
    change_children(SITE, tmp_path, monkeypatch)
    return serve()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a server without runs."""
    server = Served(tmp_path_factory.mktemp("empty"))
    yield server
    server.kill()


def test_inside_with_each_view(page: Any, served: Served, runs: LightRuns) -> None:
    stored = Path(__file__).parents[2] / "versions" / "1" / "model"
    shutil.copytree(stored, runs.root.parent / "model")  # where the finished run's recipe has it
    open_tab(page, served, "inside")
    page.locator("#inside-form select").select_option("20260101-000000-finished")
    for name, panel in PANELS.items():
        page.locator(f"#inside-form input[value={name}]").check(force=True)
        if name == "tokens":  # chosen from the start
            page.get_by_role("button", name="Show").click()
        expect(page.locator("#inside-views article.inside")).to_have_count(len(panel.views))
        assert_accessible(page, f"inside: {name}")


def test_a_page_of_the_command_inspect(page: Any, tiny_phi: Path, tmp_path: Path) -> None:
    html = tmp_path / "view.html"
    invoke("inspect", "attention", tiny_phi, "一只猫", "--html", html)
    page.goto(html.as_uri())
    page.locator("article.inside").first.wait_for()
    assert_accessible(page, "inspect --html")


def test_device_with_a_failure_and_a_warning(page: Any, served: Served) -> None:
    checks = doctor.as_json([
        failure("jetpack.old", "{l4t}", "Flash JetPack 6.2 or 7.2.", l4t="r35"),
        warning("power.slower", "{mode}; {best} is faster", "sudo nvpmodel -m {id}",
                mode="15W", best="MAXN", id=2),
    ])["checks"]  # fmt: skip
    findings = render(
        "findings.jinja", Locale("en"), examining=False, error=None, checks=checks, works=False,
        fix_parts=fix_parts,
    )  # fmt: skip
    page.route(re.compile("/live/en/device"), lambda route: route.fulfill(body=findings))
    open_tab(page, served, "device")
    page.locator(".checks .failure").wait_for()
    assert_accessible(page, "problems")


def test_every_tab_in_chinese(page: Any, served: Served) -> None:
    open_tab(page, served, language="zh_CN")
    for tab in TABS:
        choose_tab(page, tab)
        page.wait_for_timeout(1000)
        assert_accessible(page, f"{tab} in Chinese", LOOKS[:1])


def test_the_login(page: Any, serve: Serve) -> None:
    page.goto(serve("--host", "0.0.0.0").base)
    assert_accessible(page, "login", ALL_LOOKS)
