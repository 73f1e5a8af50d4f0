"""The page is used with the keyboard alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_browser import open_tab
from scripted_chat import SITE
from served import Served
from workbench import LIGHT_PIPELINE, LightRuns, change_children

from jetson_ft.runs.store import list_runs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow
expect = sync_api.expect
FINISHED = "20260101-000000-finished"
MAX_PRESSES = 80


@pytest.fixture(scope="module")
def served(runs: LightRuns) -> Iterator[Served]:
    """Return a server of the runs, whose chat answers without a model."""
    with pytest.MonkeyPatch.context() as patch:
        change_children(LIGHT_PIPELINE + SITE, runs.root.parent, patch)
        server = Served(runs.root.parent)
        yield server
        server.kill()


def move_to(page: Any, target: Any, key: str = "Tab") -> None:
    """Press a key until the target has the focus."""
    target.wait_for(state="attached")
    for _press in range(MAX_PRESSES):
        if target.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{target} is not reached with {key}")


def test_a_run_is_set_up_started_stopped_and_resumed(
    page: Any, served: Served, runs: LightRuns
) -> None:
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
    for button, state in (("Stop", "stopped"), ("Resume", "queued"), ("Stop", "stopped")):
        move_to(page, detail.get_by_role("button", name=button, exact=True))
        page.keyboard.press("Enter")
        expect(detail.locator(f".pill.{state}")).to_be_visible()
    assert run.state().attempt == 2
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


def test_files_are_uploaded(page: Any, served: Served, tmp_path: Path) -> None:
    rows = tmp_path / "mine.csv"
    rows.write_text("question,answer\n" + "q,a\n" * 8, encoding="utf-8")
    open_tab(page, served)
    page.on("filechooser", lambda _chooser: None)  # they are noticed from here on
    kinds = page.locator("#data-kind input")
    move_to(page, kinds.nth(1))
    page.keyboard.press("Space")
    expect(kinds.nth(1)).to_be_checked()
    move_to(page, page.locator("#upload button").filter(has_text="Upload"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(rows)
    expect(page.locator("#data-sources")).to_contain_text("mine.csv")


def test_a_second_run_is_compared(page: Any, served: Served) -> None:
    open_tab(page, served, "runs")
    other = page.locator(f"#runs [data-draw='{FINISHED}']")
    expect(other).to_have_attribute("aria-pressed", "false")
    move_to(page, other)
    page.keyboard.press("Space")
    expect(other).to_have_attribute("aria-pressed", "true")
    expect(other).to_be_focused()
    page.keyboard.press("Space")
    expect(other).to_have_attribute("aria-pressed", "false")


def test_two_models_are_asked_a_question(page: Any, served: Served) -> None:
    open_tab(page, served, "chat")
    expect(page.locator("#chat-first input")).not_to_have_value("")
    move_to(page, page.get_by_label("Compare with"))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#chat-b label").first).to_contain_text("base")
    move_to(page, page.get_by_role("textbox", name="Message"))
    page.keyboard.type("why?")
    page.keyboard.press("Enter")
    answers = page.locator("#chat .bot-row[data-note*=tokens]")
    expect(answers).to_have_count(2)
    assert all("answers 'why?'" in text for text in answers.all_text_contents())


def test_the_form_of_inside_is_filled_and_sent(page: Any, served: Served) -> None:
    sent: list[Any] = []

    def answer(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(status=422, json={"what": "No model here."})

    page.route(re.compile("/inside/attention$"), answer)
    page.route(re.compile("/inside/tokens$"), answer)
    open_tab(page, served, "inside")
    model = page.locator("#inside-form select")
    move_to(page, model)
    page.keyboard.press("End")
    panels = page.locator("#inside-form input[name=panel]")
    move_to(page, panels.first)
    page.keyboard.press("ArrowRight")
    expect(panels.nth(1)).to_be_checked()
    expect(page.locator("#inside-error")).to_have_text("No model here.")
    move_to(page, page.locator("fieldset[data-panel=attention] textarea"))
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("One cat")
    move_to(page, page.get_by_role("button", name="Show"))
    with page.expect_response(re.compile("/inside/attention$")):
        page.keyboard.press("Enter")
    chosen = model.locator("option").last.get_attribute("value")
    assert sent[-1] == {"model": chosen, "options": {"text": "One cat"}}
