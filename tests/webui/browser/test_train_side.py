"""The Train tab's rows, plan and command in a browser. A run is training all the time."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from in_browser import open_tab
from served import Served
from workbench import LightRuns

from jetson_ft.runs import queue, store

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytestmark = pytest.mark.slow
QWEN = "qwen3-0.6b-zh"
READING = 60_000  # milliseconds; a process reads rows


def open_form(page: Any, served: Served) -> None:
    open_tab(page, served)
    expect(page.locator(".recipe input:checked")).to_have_count(1)


def upload(page: Any, folder: Path, name: str, text: str = "question,answer\nq,a\nr,b\n") -> None:
    """Upload a file, by default of two rows."""
    path = folder / name
    path.write_text(text)
    page.locator("#data-kind label", has_text="My files").click()
    page.set_input_files("#upload input[type=file]", str(path))
    expect(page.locator(".sources")).to_contain_text(name)


def command(page: Any) -> Any:
    return page.locator(".command code").first


def colour_of(page: Any, token: str) -> str:
    """Return a token's colour as a style has it."""
    page.evaluate(f"document.body.style.setProperty('outline-color', 'var(--{token})')")
    return str(page.evaluate("getComputedStyle(document.body).outlineColor"))


def test_own_rows_are_drawn_from_one_field_and_stay_with_another_recipe(
    page: Any, served: Served, tmp_path: Path
) -> None:
    open_form(page, served)
    upload(page, tmp_path, "rows.csv")
    expect(page.locator("#data-rows")).to_contain_text(re.compile("Reading|rows"))  # by itself
    expect(page.locator("#upload")).not_to_contain_text("rows.csv")
    page.locator(f".recipe input[value='{QWEN}']").check(force=True)
    expect(command(page)).to_contain_text(f"jetson-ft train {QWEN}")
    expect(command(page)).to_contain_text("rows.csv")
    expect(page.locator(".sources li")).to_have_count(1)
    upload(page, tmp_path, "more.csv")
    expect(page.locator("[data-source-share]")).to_have_count(2)
    page.locator("[data-source-share]").first.fill("50")
    page.locator("[data-source-share]").first.press("Enter")
    expect(command(page)).to_contain_text("share: 0.5")
    for name in ("rows.csv", "more.csv"):
        page.get_by_role("button", name=f"Remove {name}").click()
        expect(command(page)).not_to_contain_text(name)
    expect(page.locator(".sources li")).to_have_count(0)
    expect(page.get_by_role("radio", name="Bundled", exact=True)).to_be_checked()


def test_sources_are_removed_as_fast_as_they_are_clicked(page: Any, served: Served) -> None:
    open_form(page, served)
    page.evaluate("jetsonFt.setFields({'data.train': '[a.csv, b.csv, c.csv]'})")
    expect(page.locator(".sources li")).to_have_count(3)
    page.evaluate(
        "document.querySelectorAll('[data-source-remove]').forEach((button, place) => "
        "{ if (place < 2) button.click() })"
    )
    expect(command(page)).to_contain_text("data.train=c.csv")
    expect(page.locator(".sources li")).to_have_count(1)
    page.get_by_role("button", name="Remove c.csv").click()
    expect(page.locator(".sources li")).to_have_count(0)


def test_start_refuses_broken_rows_until_a_button_skips_them(
    page: Any, served: Served, runs: LightRuns, tmp_path: Path
) -> None:
    open_form(page, served)
    before = len(store.list_runs(runs.root))
    rows = '{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}\n{broken\n{too\n'
    upload(page, tmp_path, "broken.jsonl", rows)
    shown = page.locator("#data-rows")
    expect(shown).to_contain_text("Training would not start.", timeout=READING)
    page.get_by_role("button", name="Start", exact=True).click()
    outcome = page.locator("#start-outcome")
    expect(outcome).to_contain_text("2 of 4 rows can't be used", timeout=READING)
    page.get_by_role("button", name="Work out the plan now").click()
    expect(page.locator("#plan .complaint")).to_be_visible(timeout=READING)
    expect(outcome).to_contain_text("2 of 4 rows can't be used")  # still true
    assert len(store.list_runs(runs.root)) == before
    page.get_by_role("button", name="Skip 2 broken rows").click()
    expect(command(page)).to_contain_text("data.on_invalid=skip")
    expect(outcome.locator(".complaint")).to_have_count(0)  # no longer true
    page.get_by_role("button", name="Look at the rows").click()
    expect(shown).to_contain_text("which are skipped: 2", timeout=READING)
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator("#run-head h2").wait_for()
    newest = max(store.list_runs(runs.root), key=lambda run: run.name)
    assert newest.recipe().data.on_invalid == "skip"


def test_rows_are_shown_as_text_and_as_tokens(page: Any, served: Served) -> None:
    open_form(page, served)
    page.get_by_role("button", name="Look at the rows").click()
    text, tokens = page.locator(".sample .turns").first, page.locator(".sample .tokens").first
    expect(text).to_be_visible(timeout=READING)
    expect(tokens).to_be_hidden()
    toggle = page.get_by_role("checkbox", name="As the model reads them")
    toggle.check()
    expect(tokens).to_be_visible()
    expect(tokens.locator("mark").first).to_be_visible()
    expect(text).to_be_hidden()
    toggle.uncheck()
    expect(text).to_be_visible()
    expect(tokens).to_be_hidden()


def test_the_command_is_copied(page: Any, served: Served) -> None:
    open_form(page, served)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#field-lora-rank input").fill("4")
    expect(command(page)).to_contain_text("lora.rank=4")
    page.locator(".command > summary").click()
    button = page.locator(".command [data-copy]").first
    button.click()
    expect(button).to_have_attribute("data-copied", "")
    assert page.evaluate("navigator.clipboard.readText()").strip() == command(page).inner_text()


def test_a_waiting_plan_comes_by_itself_when_the_run_has_ended(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    slot = queue.QueueTicket(time.time()).try_take(tmp_path / "run")  # as a training run has it
    assert slot
    server = Served(tmp_path)
    try:
        open_form(page, server)
        page.evaluate("jetsonFt.setFields({'data.train': 'owner/name'})")
        expect(page.locator("#plan")).to_contain_text("would wait in the queue")
        slot.close()
        expect(page.locator("#plan")).to_contain_text(
            "Not on this machine yet: owner/name", timeout=15_000
        )
    finally:
        server.kill()


def test_the_command_follows_each_change_and_the_plan_asks_while_a_run_trains(
    page: Any, served: Served
) -> None:
    open_form(page, served)
    expect(page.locator("#plan")).to_contain_text("would wait in the queue")
    page.get_by_role("button", name="Work out the plan now").click()
    expect(page.locator("#plan .meter").first).to_be_visible(timeout=READING)
    page.locator(".command summary").first.click()
    page.locator(".command summary").last.click()
    recipe = page.locator(".command code").last
    expect(recipe).to_contain_text("rank: 16")
    for rank in (4, 5, 6):
        page.locator("#field-lora-rank input").fill(str(rank))
    expect(command(page)).to_contain_text("--set lora.rank=6")
    expect(recipe).to_contain_text("rank: 6")
    page.evaluate("jetsonFt.setFields({'train.seed': 5})")  # folded
    expect(command(page)).to_contain_text("--set train.seed=5")
    expect(recipe).to_contain_text("seed: 5")
    expect(recipe).to_be_visible()  # still unfolded
    expect(page.locator("body")).to_have_attribute("data-plan", "stale")
    expect(page.locator("body")).not_to_have_attribute("data-plan", "stale")
    page.locator("#field-lora-rank input").fill("0")
    expect(command(page)).to_have_count(0)


def test_the_bar_ends_at_the_limit_and_a_remedy_sets_its_fields(page: Any, served: Served) -> None:
    open_form(page, served)
    bar = page.locator("#plan .meter").first
    filled = {}
    for style, token, limit in (("fits", "tuned", 4), ("tight", "base", 1.25), ("no", "bad", 0.9)):
        page.evaluate(f"jetsonFt.setFields({{'train.max_memory_gb': {limit}}})")
        expect(command(page)).to_contain_text(f"max_memory_gb={limit}")
        page.get_by_role("button", name="Work out the plan now").click()
        expect(page.locator(f"#plan .{style}")).to_be_visible(timeout=READING)
        parts = [part.bounding_box()["width"] for part in bar.locator("i").all()]
        filled[style] = sum(parts) / bar.bounding_box()["width"]
        expect(bar.locator("i").first).to_have_css("background-color", colour_of(page, token))
    assert filled["fits"] < 0.5 < 0.85 < filled["tight"] < 0.99 < filled["no"]
    expect(bar).to_have_text(re.compile(r"^\s*1\d\d %\s*$"))  # past the limit
    page.get_by_role("button", name="Use nf4", exact=True).click()
    expect(command(page)).to_contain_text("quantize=nf4")
    assert "1" not in page.locator("#attention").inner_text()


def test_start_refuses_unknown_target_modules_at_their_field(
    page: Any, served: Served, runs: LightRuns
) -> None:
    open_form(page, served)
    before = len(store.list_runs(runs.root))
    page.evaluate("jetsonFt.setFields({'lora.target_modules': 'nope'})")
    expect(command(page)).to_contain_text("nope")
    page.get_by_role("button", name="Start", exact=True).click()
    field = page.locator("#field-lora-target_modules")  # unfolded
    expect(field.locator(".mistake")).to_contain_text("no linear layer named nope", timeout=30_000)
    expect(field.locator("textarea, input")).to_be_focused()
    page.wait_for_timeout(6000)  # the waiting plan has looked whether the run still trains
    expect(field.locator(".mistake")).to_be_visible()
    assert len(store.list_runs(runs.root)) == before
    field.get_by_role("button", name="Reset").click()
    expect(page.locator(".mistake")).to_have_count(0)


def test_fields_can_be_used_while_rows_are_read(page: Any, served: Served) -> None:
    open_form(page, served)
    page.evaluate("jetsonFt.setFields({'data.max_length': 99})")  # which nobody has read
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for _time in range(2):
        requests.clear()
        page.get_by_role("button", name="Look at the rows").click()
        expect(page.locator("#data-rows .working")).to_be_visible()
        assert any("queue/join" in url for url in requests)  # also while the first is open
    started = time.monotonic()
    page.locator("#field-lora-rank input").fill("7")
    assert time.monotonic() - started < 5
    assert page.locator(".wrap.generating, .wrap.pending").filter(visible=True).count() == 0


def test_the_right_column_stays_in_sight(page: Any, served: Served) -> None:
    open_form(page, served)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_in_viewport()
    assert page.evaluate("scrollY") > 100
