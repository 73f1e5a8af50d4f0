"""Whom the chat offers, and what it takes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_routes import make_run

from jetson_ft.runs.parlour import Parlour
from jetson_ft.webui.chat import BASE, _Tab
from jetson_ft.webui.words import Words


def tab(root: Path) -> _Tab:
    return _Tab(Words("en"), root, Parlour(root))


def value(update: Any) -> Any:
    return update.value if hasattr(update, "value") else update["value"]


def test_the_newest_adapter_is_offered_until_somebody_chooses(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    assert value(chat.arrive(BASE, False)) == BASE
    for name in ("20260101-000000-old", "20260102-000000-new"):
        make_run(tmp_path, name).adapter.mkdir()
    make_run(tmp_path, "20260103-000000-no-adapter-yet")
    assert value(chat.arrive(BASE, False)) == "20260102-000000-new"
    assert value(chat.arrive(BASE, True)) == BASE
    assert value(chat.arrive("a-deleted-one", True)) == "20260102-000000-new"
    assert value(chat.arrive("microsoft/phi-1_5", True)) == "microsoft/phi-1_5"


def test_undo_takes_back_the_last_message_with_its_answers() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": [{"type": "text", "text": "c"}]}]  # fmt: skip
    assert _Tab.undo([], turns) == ("c", [], turns[:2])
    assert _Tab.undo([], []) == ("", [], [])
