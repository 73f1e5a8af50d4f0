"""The Chat tab in a browser, with answers of a script in place of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_browser import choose_tab, open_tab
from run_folders import copy_finished
from scripted_chat import CODE, SITE
from served import Served
from workbench import change_children

pytestmark = pytest.mark.slow
NEWEST, OLDER = "20260102-000000-newest", "20260101-000000-older"
NEWEST_LABEL, OLDER_LABEL = "newest ·", "older ·"  # the page adds when they were started


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return a server of two runs with adapters."""
    folder = tmp_path_factory.mktemp("chat")
    for name in (NEWEST, OLDER):
        run = copy_finished(folder / "runs", name)
        (run.path / "about.json").unlink()  # its title; now it is called as its folder
    with pytest.MonkeyPatch.context() as patch:
        change_children(SITE, folder, patch)
        server = Served(folder)
        yield server
        server.kill()


@pytest.fixture
def chat(page: Any, served: Served) -> Any:
    """Return the page with the Chat tab opened on the newest run."""
    page.set_default_timeout(10_000)
    open_tab(page, served, "chat")
    page.locator("#chat-a label", has_text=NEWEST_LABEL).wait_for()
    return page


def ask(page: Any, text: str, answers: int = 1) -> None:
    """Send a question; return when it is answered."""
    count = page.locator("#chat .bot-row[data-note*=tokens]").count()
    box = page.get_by_role("textbox", name="Message")
    box.fill(text)
    box.press("Enter")
    wait_for_answers(page, count + answers)


def wait_for_answers(page: Any, count: int) -> None:
    selector = "#chat .bot-row[data-note*=tokens]"
    page.wait_for_function(f"document.querySelectorAll('{selector}').length === {count}")
    page.get_by_role("button", name="Send", exact=True).wait_for()


def compare_with(page: Any, label: str) -> None:
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name=label).first.click()
    page.locator("#chat-b label").first.wait_for(state="attached")


def questions(page: Any, pane: str) -> list[str]:
    texts = page.locator(f"#chat-{pane} .user-row .prose").all_text_contents()  # shown or not
    return [text.strip() for text in texts]


def answers(page: Any, pane: str) -> list[str]:
    return list(page.locator(f"#chat-{pane} .bot-row .prose").all_inner_texts())


def test_markdown_and_code_are_shown_and_nothing_in_an_answer_runs(chat: Any) -> None:
    left: list[str] = []
    chat.on("requestfinished", lambda request: left.append(request.url))
    chat.route("http://evil.invalid/**", lambda route: route.fulfill(body=""))
    ask(chat, "code")
    assert chat.locator("#chat-a pre code").inner_text().rstrip() == (
        "def f(x):\n    if x:\n        return 1"
    )
    assert chat.locator("#chat-a .bot-row strong").inner_text() == "bold"
    ask(chat, "hostile")
    chat.get_by_text("the end").wait_for()
    assert chat.get_by_text("#include <stdio.h>").count() == 1
    forbidden = "script, iframe, link, style, [onerror], [onload], [href^='javascript']"
    assert chat.locator(f"#chat-a .prose :is({forbidden})").count() == 0
    chat.locator("#chat-a form button").click()
    chat.wait_for_timeout(300)
    assert chat.url.endswith("/en/#chat"), "the form has sent nothing"
    assert chat.evaluate("window.hacked") is None
    assert [url for url in left if "evil" in url] == []


def test_a_question_is_over_both_answers_which_scroll_as_one(chat: Any) -> None:
    compare_with(chat, "(base)")
    for text in ("code", "plain", "long"):
        ask(chat, text, answers=2)
    tops = "rows => rows.map(row => row.getBoundingClientRect().top)"
    boxes = {each: chat.locator(each).bounding_box() for each in ("#chat-panes", "#chat-a label")}
    for kind in (".bot-row", ".message-buttons-left", ".options"):
        first, second = (chat.locator(f"#chat-{pane} {kind}").evaluate_all(tops) for pane in "ab")
        assert first == second and len(first) == (1 if kind == ".options" else 3)
    assert chat.locator("#chat-b .user-row:visible").count() == 0
    for row in chat.locator("#chat-a .user-row").all():
        assert row.bounding_box()["width"] > 1.9 * boxes["#chat-a label"]["width"]
    panes = chat.locator("#chat-panes")
    at_end = "panes => panes.scrollHeight - panes.scrollTop - panes.clientHeight < 2"
    assert panes.evaluate("panes => panes.scrollTop") > 0 and panes.evaluate(at_end)
    assert chat.locator("#chat-a label").bounding_box() == boxes["#chat-a label"], "it stays"
    chat.get_by_role("textbox", name="Message").fill("slow")
    chat.keyboard.press("Enter")
    chat.locator("#chat-a .bot-row", has_text="1 2 3").wait_for()
    panes.hover()
    chat.mouse.wheel(0, -2000)
    chat.locator("#chat-a .bot-row", has_text="30 31").wait_for()
    assert panes.evaluate("panes => panes.scrollTop") == 0, "it was scrolled up"
    chat.get_by_role("button", name="Stop").click()
    wait_for_answers(chat, 7)


def test_both_panes_hold_the_same_questions_after_a_stop(chat: Any) -> None:
    compare_with(chat, "(base)")
    assert chat.locator("#chat-a label").first.inner_text().startswith(NEWEST_LABEL)
    assert "(base)" in chat.locator("#chat-b label").first.inner_text()
    box = chat.get_by_role("textbox", name="Message")
    box.fill("slow")
    box.press("Enter")
    chat.locator("#chat-a .bot-row", has_text="1 2").wait_for()
    chat.get_by_role("button", name="Stop").click()
    wait_for_answers(chat, 1)
    assert questions(chat, "a") == questions(chat, "b") == ["slow"]
    chat.locator("#chat-b .bot-row[data-note='not answered']").wait_for()
    ask(chat, "next", answers=2)
    assert questions(chat, "a") == questions(chat, "b") == ["slow", "next"]
    assert "after 1 turns" in answers(chat, "a")[-1]
    assert "the base of" in answers(chat, "b")[-1] and "after 0 turns" in answers(chat, "b")[-1]


def test_an_answer_is_continued_given_again_and_a_question_edited(chat: Any) -> None:
    compare_with(chat, OLDER_LABEL)
    ask(chat, "long", answers=2)
    chat.locator("#chat-a").get_by_role("button", name="Continue").click()
    chat.locator("#chat-a .bot-row", has_text="the beginning and the end").wait_for()
    assert answers(chat, "b") == ["the beginning"]
    chat.locator("#chat-a").get_by_role("button", name="Retry").click()
    chat.locator("#chat-a .bot-row[data-note*=cut]").wait_for()
    assert answers(chat, "a") == answers(chat, "b") == ["the beginning"]
    ask(chat, "second", answers=2)
    assert chat.get_by_role("button", name="Retry").count() == 4, "one under each answer"
    chat.locator("#chat-b").get_by_role("button", name="Retry").first.click()
    wait_for_answers(chat, 2)
    assert questions(chat, "a") == questions(chat, "b") == ["long"]
    assert chat.get_by_role("button", name="Retry").count() == 2
    ask(chat, "second", answers=2)
    chat.get_by_role("button", name="Edit").first.click()
    chat.locator("#chat-a textarea").fill("other")
    chat.get_by_role("button", name="Submit").click()
    chat.locator("#chat-b .bot-row", has_text="'other'").wait_for()
    assert questions(chat, "a") == questions(chat, "b") == ["other"]
    assert NEWEST in answers(chat, "a")[0] and OLDER in answers(chat, "b")[0]


def test_each_message_is_copied_as_it_was_written(chat: Any) -> None:
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    compare_with(chat, "(base)")
    ask(chat, "code", answers=2)
    ask(chat, "plain", answers=2)
    copied = []
    for buttons in chat.locator("#chat-panes .message-buttons:visible").all():
        buttons.get_by_role("button", name="Copy message").click()
        copied.append(chat.evaluate("navigator.clipboard.readText()"))
    first, second = answers(chat, "a")[1], answers(chat, "b")[1]
    assert copied == ["code", CODE, "plain", first, CODE, second]


def test_enter_sends_but_not_while_an_input_method_composes(chat: Any) -> None:
    box = chat.get_by_role("textbox", name="Message")
    box.fill("ni hao")
    composing = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    box.evaluate(f"box => box.dispatchEvent({composing})")
    box.press("Shift+Enter")
    box.press_sequentially("line 2")
    chat.wait_for_timeout(300)
    assert questions(chat, "a") == [] and box.input_value() == "ni hao\nline 2"
    box.press("Enter")
    wait_for_answers(chat, 1)
    assert box.input_value() == ""


def test_examples_and_a_first_question_come_from_the_data(chat: Any) -> None:
    chat.get_by_role("button", name="Settings").click()
    chat.get_by_role("button", name="Three from the data").click()
    chat.get_by_role("textbox", name="Question").nth(2).wait_for()
    chat.get_by_role("button", name="Remove").first.click()
    chat.get_by_label("Creative").check()
    chat.wait_for_function("document.querySelector('#chat-temperature input').value === '1.1'")
    chat.keyboard.press("Escape")
    assert chat.evaluate("document.activeElement.dataset.chat") == "settings"
    starters = chat.locator("#chat-a .example")
    assert starters.count() == 2, "as many as the report has samples"
    starters.first.click()
    wait_for_answers(chat, 1)
    assert "and 2 examples" in answers(chat, "a")[0]


def test_history_is_kept_in_the_browser_and_exported(chat: Any) -> None:
    compare_with(chat, "(base)")
    ask(chat, "one", answers=2)
    chat.wait_for_function("localStorage.getItem('jetson-ft-chats')?.includes('one')")
    chat.reload()
    chat.locator("#chat-b .bot-row").wait_for()
    assert questions(chat, "a") == questions(chat, "b") == ["one"]
    chat.get_by_role("button", name="New chat").click()
    chat.locator("#chat-a .example").first.wait_for()
    ask(chat, "two", answers=2)
    chat.get_by_role("button", name="History").click()
    chat.get_by_role("button", name=re.compile("^one")).click()
    chat.locator("#chat-a .user-row", has_text="one").wait_for()
    with chat.expect_download() as download:
        chat.get_by_role("button", name="JSON").click()
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert saved["models"] == [NEWEST, "own-base"]
    (turn,) = saved["turns"]
    assert turn["question"] == "one" and "the base of" in turn["answers"][1]
    with chat.expect_download() as download:
        chat.get_by_role("button", name="Text", exact=True).click()
    assert Path(download.value.path()).read_text(encoding="utf-8").startswith("> one\n\n[")
    chat.locator("#chat-history li", has_text="two").get_by_role("button", name="Delete").click()
    assert chat.locator("#chat-history li").count() == 1


def test_a_conversation_is_still_there_after_its_menu_and_another_tab(chat: Any) -> None:
    chat.get_by_role("button", name="New chat").click()
    chat.locator("#chat-a .example").first.wait_for()
    ask(chat, "one")
    for _press in range(2):
        chat.get_by_role("button", name="Settings").click()
    choose_tab(chat, "runs")
    choose_tab(chat, "chat")
    chat.wait_for_timeout(1000)  # for the server's answer, which could replace it
    assert questions(chat, "a") == ["one"]
    assert chat.locator("#chat-a label").first.inner_text().startswith(NEWEST_LABEL)


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 664)])
def test_the_tab_fills_the_window_with_the_composer_at_its_end(
    chat: Any, width: int, height: int
) -> None:
    chat.set_viewport_size({"width": width, "height": height})
    compare_with(chat, "(base)")
    for _ in range(3):
        ask(chat, "code", answers=2)
    box = chat.locator("#chat-message").bounding_box()
    assert height - 40 < box["y"] + box["height"] <= height
    assert chat.evaluate("document.documentElement.scrollHeight") <= height
    assert chat.evaluate("document.documentElement.scrollWidth") <= width
    if width == 390:
        assert not chat.locator("#chat-b").is_visible()
        assert all(chat.locator(f"#chat-{pane} .user-row").count() == 3 for pane in "ab")
        assert "newest" in chat.locator("[data-chat-pane=a]").inner_text()
        chat.locator("[data-chat-pane=b]", has_text="(base)").click()
        assert chat.locator("#chat-b").is_visible() and not chat.locator("#chat-a").is_visible()


def test_a_link_opens_the_tab_with_a_model(chat: Any) -> None:
    chat.evaluate("location.hash = 'runs'")
    chat.locator("#chat").wait_for(state="hidden")
    chat.evaluate(f"jetsonFt.chatWith('{OLDER}')")
    chat.locator("#chat-a label", has_text=OLDER_LABEL).wait_for()


@pytest.mark.parametrize("way", ["link", "choice"])
def test_another_model_ends_the_answer_that_is_generated(chat: Any, way: str) -> None:
    box = chat.get_by_role("textbox", name="Message")
    box.fill("slow")
    box.press("Enter")
    chat.locator("#chat-a .bot-row", has_text="1 2").wait_for()
    if way == "link":
        chat.evaluate("location.hash = 'runs'")
        chat.locator("#chat").wait_for(state="hidden")
        chat.evaluate(f"jetsonFt.chatWith('{OLDER}')")
    else:
        chat.get_by_label("Model", exact=True).click()
        chat.get_by_role("option", name=OLDER_LABEL).click()
    chat.locator("#chat-a label", has_text=OLDER_LABEL).wait_for()
    chat.locator("#chat-a .example").first.wait_for()
    chat.get_by_role("button", name="Send", exact=True).wait_for()
    chat.wait_for_timeout(300)  # what is left of the old answer would come now
    assert questions(chat, "a") == []
    ask(chat, "plain")
    assert questions(chat, "a") == ["plain"] and OLDER in answers(chat, "a")[0]
    chat.get_by_role("button", name="History").click()
    chat.locator("#chat-history [aria-current=true]", has_text="plain").wait_for()
    kept = chat.locator("#chat-history li").all_inner_texts()
    assert ["plain" in kept[0], "older" in kept[0]] == [True, True], kept
    assert ["slow" in kept[1], "newest" in kept[1]] == [True, True], kept
