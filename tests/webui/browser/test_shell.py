"""The page's head, its tabs and what all of them share, in a browser."""

from __future__ import annotations

import re
from typing import Any

import pytest
from in_browser import TABS, choose_tab, open_tab
from script_modules import load_script
from served import Served

from jetson_ft.webui.theme import STATIC

pytestmark = pytest.mark.slow
SELECTED = "document.querySelector('#tabs [aria-selected=true]')?.dataset.tabId"
DARK = "document.body.classList.contains('dark')"
COLOUR = "getComputedStyle(document.body).backgroundColor"


def wait_for_tab(page: Any, tab: str) -> None:
    page.wait_for_function(f"{SELECTED} === '{tab}'")


# --- tabs -------------------------------------------------------------------------------------


def test_the_tab_is_kept_over_a_reload_and_a_change_of_language(page: Any, served: Served) -> None:
    open_tab(page, served, "runs")
    assert re.search(r"/en/(\?.*)?#runs$", page.url)
    page.reload()
    wait_for_tab(page, "runs")
    page.get_by_role("button", name="简体中文").click()
    page.wait_for_url("**/zh_CN/**#runs")
    wait_for_tab(page, "runs")
    page.goto(f"{served.base}/zh_CN/#device")  # a link within the page
    wait_for_tab(page, "device")


def test_an_address_with_a_run_opens_runs_only_where_it_names_no_tab(
    page: Any, served: Served
) -> None:
    page.goto(f"{served.base}/en/?run=x")
    wait_for_tab(page, "runs")
    page.goto(f"{served.base}/en/?run=x#chat")
    wait_for_tab(page, "chat")
    page.wait_for_timeout(1500)  # the page's own events have come
    wait_for_tab(page, "chat")
    page.reload()
    page.get_by_role("button", name="简体中文").click()
    page.wait_for_url("**/zh_CN/**#chat")
    page.wait_for_timeout(1500)
    assert page.evaluate(SELECTED) == "chat"


def test_arrow_keys_move_between_tabs(page: Any, served: Served) -> None:
    open_tab(page, served)
    page.get_by_role("tab").first.focus()
    for key, tab in (
        ("ArrowRight", TABS[1]), ("End", TABS[-1]), ("ArrowRight", "train"),
        ("ArrowLeft", TABS[-1]), ("Home", "train"),
    ):  # fmt: skip
        page.keyboard.press(key)
        wait_for_tab(page, tab)
        assert page.evaluate("document.activeElement.dataset.tabId") == tab
    page.keyboard.press("Shift+Tab")  # one stop for all tabs, as WAI-ARIA has it
    assert page.evaluate("document.activeElement.role") != "tab"
    (panel,) = page.get_by_role("tabpanel").all()
    chosen = page.locator("#tabs > .tab-wrapper [role=tab][aria-selected=true]")
    assert chosen.get_attribute("aria-controls") == panel.get_attribute("id")
    chosen.focus()
    assert chosen.evaluate("tab => getComputedStyle(tab).outlineWidth") == "2px"


def test_the_place_on_a_page_is_kept_over_a_reload(page: Any, served: Served) -> None:
    page.set_viewport_size({"width": 390, "height": 500})
    open_tab(page, served)
    page.get_by_role("tabpanel").get_by_role("button").first.wait_for()
    page.wait_for_function("document.body.scrollHeight > 900")
    page.evaluate("scrollTo(0, 300)")
    page.reload()
    page.wait_for_function("scrollY === 300")


def test_the_place_on_a_page_is_kept_over_a_change_of_language(page: Any, served: Served) -> None:
    page.set_viewport_size({"width": 390, "height": 500})
    open_tab(page, served)
    page.wait_for_function("document.body.scrollHeight > 900")
    page.evaluate("scrollTo(0, 300)")
    page.locator("[data-language=zh_CN]").evaluate("button => button.click()")
    page.wait_for_url("**/zh_CN/**")
    page.wait_for_function("scrollY === 300")


def test_an_update_leaves_what_a_person_opened_or_closed(page: Any, served: Served) -> None:
    open_tab(page, served)
    before, after = (f"<details open><summary>{text}</summary></details>" for text in "12")
    text, is_open = page.evaluate(
        """async ([script, before, after]) => {
            const { morph } = await import(script);
            const element = document.createElement("div");
            morph(element, before);
            element.firstElementChild.open = false;
            morph(element, after);
            return [element.textContent, element.firstElementChild.open];
        }""",
        [f"{STATIC}/morph.js", before, after],
    )
    assert text == "2" and not is_open


def test_only_the_shown_tab_polls(page: Any, served: Served) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    open_tab(page, served, "device")
    with page.expect_request("**/gauges"), page.expect_request("**/device*"):
        pass
    choose_tab(page, "train")
    page.wait_for_timeout(500)
    requests.clear()
    page.wait_for_timeout(3000)
    assert [url for url in requests if "/live/" in url] == []


# --- colours and language -----------------------------------------------------------------------


def test_the_chosen_colours_hold_against_the_systems(page: Any, served: Served) -> None:
    page.emulate_media(color_scheme="light")
    open_tab(page, served)
    light = page.evaluate(COLOUR)
    page.get_by_role("radio", name="Dark").check()
    dark = page.evaluate(COLOUR)
    assert dark != light and page.evaluate(DARK)
    page.emulate_media(color_scheme="dark")
    page.emulate_media(color_scheme="light")
    page.reload()
    wait_for_tab(page, "train")
    assert page.evaluate(DARK) and page.evaluate(COLOUR) == dark
    assert page.get_by_role("radio", name="Dark").is_checked()
    page.get_by_role("radio", name="As the system").check()
    assert page.evaluate(COLOUR) == light
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(DARK)


@pytest.mark.parametrize(
    ("browsers", "language", "text", "other"),
    [
        ("en-GB", "zh_CN", "点击上传", "Click to Upload"),
        ("zh-CN", "en", "Click to Upload", "点击上传"),
    ],
)
def test_gradios_own_texts_are_in_the_pages_language(
    browser: Any, served: Served, browsers: str, language: str, text: str, other: str
) -> None:
    page = browser.new_page(locale=browsers)
    open_tab(page, served, language=language)
    page.locator("#data-kind label").nth(1).click()  # the user's files
    page.locator("#upload").get_by_text(text).wait_for()
    assert page.get_by_text(other).count() == 0
    assert page.evaluate("document.documentElement.lang") == language.replace("_", "-")


# --- network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_no_request_leaves_the_machine(page: Any, served: Served, language: str) -> None:
    hosts: set[str] = set()
    failed: list[str] = []
    page.on(
        "request", lambda request: hosts.add(re.sub(r"(\w+://[^/]*|\w+:).*", r"\1", request.url))
    )
    page.on("response", lambda response: response.status < 400 or failed.append(response.url))
    open_tab(page, served, language=language)
    for tab in TABS:
        choose_tab(page, tab)
        page.wait_for_timeout(300)
    assert hosts - {"data:", "blob:"} == {served.base}
    assert failed == []


def test_a_page_reports_its_end(page: Any, served: Served) -> None:
    with page.expect_request("**/heartbeat/*") as heartbeat:
        open_tab(page, served)
    session = heartbeat.value.url.rpartition("/")[2]
    with page.expect_response(f"**/closed/{session}") as response:
        page.evaluate("dispatchEvent(new Event('pagehide'))")
    assert response.value.status == 204


def test_eight_pages_load_and_answer(browser: Any, served: Served) -> None:
    """HTTP/1.1 has six connections to a host, which a stream for each page would use up."""
    context = browser.new_context(locale="en-GB")
    for number in range(8):
        page = context.new_page()
        page.goto(f"{served.base}/en/#{'runs' if number % 2 else 'device'}")
        page.locator("#run-detail h2, #device-findings h2").first.wait_for(timeout=20_000)


@pytest.mark.slow(minutes=0.5)
def test_loads_are_small_quick_and_do_not_shift(browser: Any, served: Served) -> None:
    """A second load fetches no script and no style."""
    measure = load_script("measure_page").measure_loads
    loads = [measure(browser, f"{served.base}/en/") for _number in range(3)]
    first, second = loads[0]
    assert first.received < 500_000 and first.shift < 0.1 and second.shift < 0.1
    assert min(load.seconds for load, _second in loads) < 2.0
    files = re.compile("/assets/|/static/")
    assert len([*filter(files.search, first.fetched)]) > 50
    assert [*filter(files.search, second.fetched)] == []
