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

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytestmark = pytest.mark.slow
QWEN = "qwen3-0.6b-zh"


def open_form(page: Any, served: Served) -> None:
    open_tab(page, served)
    expect(page.locator(".recipe input:checked")).to_have_count(1)


def upload(page: Any, folder: Path, name: str) -> None:
    """Upload a file of two rows."""
    path = folder / name
    path.write_text("question,answer\nq,a\nr,b\n")
    page.locator("#data-kind label", has_text="My files").click()
    page.set_input_files("#upload input[type=file]", str(path))
    expect(page.locator(".sources")).to_contain_text(name)


def command(page: Any) -> Any:
    return page.locator(".command code").first


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


def test_the_command_follows_each_change_and_the_plan_asks_while_a_run_trains(
    page: Any, served: Served
) -> None:
    open_form(page, served)
    expect(page.locator("#plan")).to_contain_text("would wait in the queue")
    page.get_by_role("button", name="Work out the plan now").click()
    expect(page.locator("#plan .meter").first).to_be_visible(timeout=30_000)
    page.locator(".command > summary").click()
    for rank in (4, 5, 6):
        page.locator("#field-lora-rank input").fill(str(rank))
    expect(command(page)).to_contain_text("--set lora.rank=6")
    expect(page.locator("body")).to_have_attribute("data-plan", "stale")
    expect(page.locator("body")).not_to_have_attribute("data-plan", "stale")
    page.locator("#field-lora-rank input").fill("0")
    expect(command(page)).to_have_count(0)


def test_the_bar_ends_at_the_limit_and_a_remedy_sets_its_fields(page: Any, served: Served) -> None:
    open_form(page, served)
    page.evaluate("jetsonFt.setFields({'train.max_memory_gb': 0.9})")
    expect(command(page)).to_contain_text("max_memory_gb=0.9")
    page.get_by_role("button", name="Work out the plan now").click()
    bar = page.locator("#plan .meter").first
    expect(bar.locator("i")).to_have_text(re.compile(r"^1\d\d %$"), timeout=30_000)
    full, width = (box.bounding_box()["width"] for box in (bar, bar.locator("i")))
    assert width == pytest.approx(full, abs=3)
    page.get_by_role("button", name="Use nf4", exact=True).click()
    expect(command(page)).to_contain_text("quantize=nf4")
    assert "1" not in page.locator("#attention").inner_text()


def test_start_refuses_what_would_fail_and_says_so_beside_it(
    page: Any, served: Served, runs: LightRuns
) -> None:
    open_form(page, served)
    before = len(list(runs.root.glob("2*")))
    page.evaluate("jetsonFt.setFields({'lora.target_modules': 'nope'})")
    expect(command(page)).to_contain_text("nope")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator("#start-outcome")).to_contain_text("nope")
    assert len(list(runs.root.glob("2*"))) == before
    page.evaluate("jetsonFt.setFields({'lora.target_modules': 'all-linear'})")
    expect(page.locator("#start-outcome .complaint")).to_have_count(0)  # no longer true


def test_fields_can_be_used_while_rows_are_read(page: Any, served: Served) -> None:
    open_form(page, served)
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
