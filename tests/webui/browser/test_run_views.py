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
