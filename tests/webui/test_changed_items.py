"""Lists of which unchanged items are not sent again."""

from __future__ import annotations

from jetson_ft.webui.changed_items import MARK, SentLists


def a_list(**items: str) -> str:
    return MARK.join(
        ["<ul>", *(f'<li id="{name}"><b>{text}</b></li>' for name, text in items.items()), "</ul>"]
    )


def test_items_of_the_list_that_the_page_has_are_left_out() -> None:
    sent = SentLists()
    first = a_list(a="one", b="two")
    assert sent.changes(first, "1", "") == first.replace(MARK, "")
    second = sent.changes(a_list(b="two", c="three", a="ONE"), "2", "1")
    assert second == (
        '<ul><li id="b" data-same></li><li id="c"><b>three</b></li><li id="a"><b>ONE</b></li></ul>'
    )


def test_a_page_with_an_unknown_list_gets_all() -> None:
    sent = SentLists()
    sent.changes(a_list(a="one"), "1", "")
    for number in range(100):
        sent.changes(a_list(a="two"), f"other {number}", "")
    assert "data-same" not in sent.changes(a_list(a="one"), "3", "1")


def test_an_empty_list_is_sent_as_it_is() -> None:
    assert SentLists().changes("<p>", "1", "") == "<p>"
