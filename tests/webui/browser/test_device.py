"""The Device tab in a browser: findings, what is copied, gauges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from in_browser import choose_tab, open_tab
from served import Served
from workbench import LightRuns, change_children

from jetson_ft.hardware import doctor
from jetson_ft.hardware.doctor.finding import ok, warning

pytestmark = pytest.mark.slow
FINDINGS = doctor.as_json([
    ok("board.other", "not a Jetson: {name}, {cores} cores", name="x", cores=2),
    warning("power.slower", "{mode}; {best} is faster", "sudo nvpmodel -m {id}",
            mode="15W", best="MAXN", id=2),
])  # fmt: skip
# The doctor's command, which takes a second.
DOCTOR = f"""
import sys

if "jetson_ft.cli" in sys.orig_argv and "doctor" in sys.orig_argv:
    import time

    time.sleep(1)
    print({json.dumps(FINDINGS)!r})
    sys.exit()
"""


@pytest.fixture(scope="module")
def served(runs: LightRuns) -> Iterator[Served]:
    """Return a server of the runs, whose doctor has these findings on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        change_children(DOCTOR, runs.root.parent, patch)
        server = Served(runs.root.parent)
        yield server
        server.kill()


def test_the_verdict_the_checks_and_the_gauges(page: Any, served: Served) -> None:
    open_tab(page, served, "device")
    page.locator(".gauge", has_text="Memory").get_by_role("meter").wait_for()  # while it examines
    page.locator(".verdict.works").wait_for()
    states = page.locator(".checks li").evaluate_all("rows => rows.map(row => row.className)")
    assert states == ["warning", "ok"]

    again = page.get_by_role("button", name="Examine again")
    again.focus()
    page.keyboard.press("Enter")
    page.locator("[data-examining]").wait_for()
    assert page.locator(".checks li").count() == 2, "the last findings stay"
    again.wait_for()
    assert page.locator("#announcer").inner_text() == "Training works here"


def test_a_command_is_copied(page: Any, served: Served) -> None:
    finding = (
        '<span class="copied"><code>sudo nvpmodel -m 2</code>'
        '<button class="do" data-copy>Copy</button></span>'
    )
    page.route("**/live/en/device*", lambda route: route.fulfill(body=finding))
    open_tab(page, served, "device")
    button = page.locator("#device-page").get_by_role("button", name="Copy")
    button.click()
    assert page.evaluate("getSelection().toString()") == "sudo nvpmodel -m 2"
    assert page.locator("#announcer").inner_text() == "Copied"
    with page.expect_response("**/live/en/device*"):
        pass
    assert button.get_attribute("data-copied") == "", "it stays marked"


def test_the_gauges_are_read_again_and_again(page: Any, served: Served) -> None:
    open_tab(page, served, "device")
    with page.expect_response("**/gauges"):
        pass
    with page.expect_response("**/gauges"):  # again, without a press
        pass
    assert page.get_by_role("meter").first.get_attribute("aria-valuenow").isdigit()


def test_the_machine_is_examined_when_the_tab_is_opened(page: Any, served: Served) -> None:
    opened: list[bool] = []
    page.on("request", lambda request: note(request.url))

    def note(url: str) -> None:
        if "/live/en/device" in url:
            opened.append(url.endswith("?opened=true"))

    for _time in range(2):
        opened.clear()
        open_tab(page, served, "device")
        while len(opened) < 2:
            with page.expect_response("**/live/en/device*"):
                pass
        assert opened == [True, False]
        choose_tab(page, "train")


def test_a_failed_examination_is_reported(page: Any, served: Served) -> None:
    open_tab(page, served, "device")
    again = page.get_by_role("button", name="Examine again")
    again.wait_for(timeout=60_000)
    page.route("**/device/examine", lambda route: route.abort())
    again.click()
    page.get_by_role("alert").filter(has_text="The page's server doesn't respond.").wait_for()
