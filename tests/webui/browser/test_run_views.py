"""Names edited in place, the dialog, the views' forms and the table, in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from in_browser import open_tab
from run_folders import copy_finished, make_run
from served import Served
from workbench import LightRuns

from jetson_ft.runs import manager
from jetson_ft.runs.store import Run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytestmark = pytest.mark.slow(minutes=0.5)
NAMES = ("20260101-000000-a", "20260102-000000-b", "20260103-000000-c")


@pytest.fixture(scope="module")
def views(runs: LightRuns) -> Iterator[LightRuns]:
    """Return runs of a run's views: two that have finished, and one that can be deleted."""
    for name in NAMES[:2]:
        (copy_finished(runs.root, name).path / "about.json").unlink()
    make_run(runs.root, NAMES[2], "stopped")
    yield runs
    for name in NAMES:
        shutil.rmtree(runs.root / name, ignore_errors=True)


def choose(page: Any, name: str, place: str = "#run-list") -> None:
    """Choose a run in the list or the table; its head is shown afterwards."""
    page.locator(f'{place} [data-choose="{name}"]').click()
    page.locator(f'.run-name form[data-run="{name}"]').wait_for(state="attached")


@pytest.fixture
def runs_page(page: Any, served: Served, views: LightRuns) -> Any:
    """Return the page with the first run shown."""
    open_tab(page, served, "runs")
    choose(page, NAMES[0])
    return page


def test_a_name_is_edited_in_place_with_the_keyboard(runs_page: Any, views: LightRuns) -> None:
    rename, field = runs_page.locator("#run-rename"), runs_page.locator(".run-name [name=title]")
    rename.press("Enter")
    assert field.evaluate("field => field === document.activeElement")
    field.fill("never")
    field.press("Escape")
    assert not field.is_visible() and rename.evaluate("button => button === document.activeElement")
    rename.press("Enter")
    field.fill("Better <b>name")
    # What is fetched while the field is open is fetched again after it.
    manager.set_title_and_notes(Run(views.root / NAMES[0]), "Better <b>name")
    runs_page.locator("#run-list", has_text="Better <b>name").wait_for()
    assert field.input_value() == "Better <b>name"
    field.press("Enter")
    runs_page.locator("#run-head h2", has_text="Better <b>name").wait_for()
    choose(runs_page, NAMES[1])  # its own name is in the field
    rename.press("Enter")
    assert field.input_value() == "" and field.get_attribute("placeholder") == "b"
    assert "Better" in (views.root / NAMES[0] / "about.json").read_text()


def test_a_run_is_deleted_after_a_dialog(runs_page: Any, views: LightRuns) -> None:
    choose(runs_page, NAMES[2])
    delete = runs_page.locator('#run-head [data-do="delete"]')
    dialog = runs_page.locator("dialog[open]")
    delete.press("Enter")
    assert "can't be undone" in dialog.inner_text()
    assert dialog.locator("[value=no]").evaluate("button => button === document.activeElement")
    runs_page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert delete.evaluate("button => button === document.activeElement")
    delete.press("Enter")
    runs_page.keyboard.press("Tab")
    runs_page.keyboard.press("Enter")
    runs_page.locator(f'[data-choose="{NAMES[2]}"]').wait_for(state="detached")
    assert not (views.root / NAMES[2]).exists()


def test_a_log_is_searched_while_the_focus_stays(runs_page: Any, views: LightRuns) -> None:
    (views.root / NAMES[0] / "log.txt").write_text("one\nW x: two\nTwo\n")
    runs_page.locator("#view-log").click()
    field = runs_page.locator("#log-text")
    field.press_sequentially("two")
    runs_page.locator("#run-view", has_text="Matching lines: 2").wait_for()
    assert field.input_value() == "two"
    assert field.evaluate("field => field === document.activeElement")
    assert runs_page.locator("#log-lines").inner_text().split("\n") == ["W x: two", "Two", ""]


def test_a_log_is_copied(runs_page: Any, views: LightRuns) -> None:
    lines = "one\nW x: <b>two</b>\n中文\n"
    (views.root / NAMES[0] / "log.txt").write_text(lines)
    runs_page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    runs_page.locator("#view-log").click()
    runs_page.locator("#log-lines", has_text="中文").wait_for()
    runs_page.get_by_role("button", name="Copy", exact=True).click()
    assert runs_page.evaluate("navigator.clipboard.readText()").rstrip() == lines.rstrip()
    assert runs_page.locator("#announcer").inner_text() == "Copied"


def test_checked_boxes_look_checked(runs_page: Any) -> None:
    """Gradio's mark is white, so that it is seen only on a ground of another colour."""

    def look(box: Any) -> str:
        return str(box.evaluate("box => getComputedStyle(box).backgroundColor"))

    runs_page.locator("#view-samples").click()
    box = runs_page.locator("#samples-differ")
    before = look(box)
    box.check()
    assert look(box) != before
    runs_page.locator("#view-export").click()
    chosen, other = (runs_page.locator("form.export [type=radio]").nth(place) for place in (0, 1))
    before = look(other)
    assert look(chosen) != before
    other.check()
    assert look(other) != before and look(chosen) == before


def test_the_name_of_a_run_is_the_heading_of_its_report(runs_page: Any) -> None:
    runs_page.locator("#run-rename").click()
    runs_page.locator(".run-name [name=title]").fill("Poems <2>")
    runs_page.locator(".run-name").get_by_role("button", name="Save").click()
    runs_page.locator("#run-head h2", has_text="Poems <2>").wait_for()
    with runs_page.expect_popup() as popup:
        runs_page.get_by_role("link", name="Report").click()
    report = popup.value
    assert report.locator("h1").inner_text() == "Poems <2>"
    assert report.title() == "Poems <2> · jetson-ft"


def test_use_again_puts_a_runs_settings_into_the_form(runs_page: Any, views: LightRuns) -> None:
    runs_page.get_by_role("link", name="Use again").click()
    expect(runs_page.locator("#goal-notice")).to_contain_text(Run(views.root / NAMES[0]).title())
    expect(runs_page.locator("#field-lora-rank input")).to_have_value("2")  # its recipe's


def test_chat_opens_with_the_run(runs_page: Any, views: LightRuns) -> None:
    runs_page.get_by_role("button", name="Chat", exact=True).click()
    title = Run(views.root / NAMES[0]).title()
    # With the time of its start.
    expect(runs_page.locator("#chat-a label").first).to_contain_text(f"{title} · ", timeout=10_000)
    assert runs_page.evaluate("location.hash") == "#chat"


def test_the_table_sorts_compares_and_opens_a_run(runs_page: Any) -> None:
    runs_page.locator("#runs-table").click()
    runs_page.locator('[data-sort="title"]').click()
    runs_page.locator('[aria-sort="ascending"] [data-sort="title"]').wait_for()
    for name in NAMES[:2]:
        runs_page.locator(f"#draw-{name}").click()
    link = runs_page.locator('#run-table a[href*="compare.html"]')
    link.wait_for()
    assert all(name in link.get_attribute("href") for name in NAMES[:2])
    choose(runs_page, NAMES[1], "#run-table")
    runs_page.locator("#view-settings").click()  # beside the other one that is ticked
    runs_page.locator("table.settings thead").wait_for()
    assert runs_page.locator("table.settings thead th").count() == 2
