"""Whom the chat offers, and what it takes back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from test_routes import make_run

from jetson_ft.errors import UserError
from jetson_ft.runs.parlour import Answer, Parlour
from jetson_ft.webui.chat import _SLIDERS, BASE, _Tab
from jetson_ft.webui.words import Words

SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def tab(root: Path) -> _Tab:
    return _Tab(Words("en"), root, Parlour(root))


def value(update: Any) -> Any:
    return update.value if hasattr(update, "value") else update["value"]


def test_the_newest_adapter_is_offered_until_somebody_chooses(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    assert value(chat.arrive(BASE, False, [])) == BASE
    for name in ("20260101-000000-old", "20260102-000000-new"):
        make_run(tmp_path, name).adapter.mkdir()
    make_run(tmp_path, "20260103-000000-no-adapter-yet")
    assert value(chat.arrive(BASE, False, [])) == "20260102-000000-new"
    assert value(chat.arrive(BASE, True, [])) == BASE
    assert value(chat.arrive(BASE, False, SAID)) == BASE, "nobody is torn from a conversation"
    assert value(chat.arrive("a-deleted-one", True, SAID)) == "20260102-000000-new"
    folder = str(tmp_path / "20260101-000000-old" / "adapter")
    (Path(folder) / "adapter_config.json").write_text("{}")
    for typed in ("microsoft/phi-1_5", "latest", folder):
        assert value(chat.arrive(typed, True, [])) == typed


def test_a_conversation_stands_under_its_partners_kind(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    assert [chat.title(name) for name in (BASE, "o/n", "a-run")] == ["Base", "Base", "Adapter"]
    request: Any = SimpleNamespace(session_hash="me")
    base, adapter, _ = chat.choose(request, "o/n")
    assert base == [] and adapter.label == "Base" and not adapter.value


def test_undo_takes_back_the_last_message_with_its_answers() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": [{"type": "text", "text": "c"}]}]  # fmt: skip
    assert _Tab.undo([], turns) == ("c", [], turns[:2])
    assert _Tab.undo([], []) == ("", [], [])
    assert _Tab.undo(SAID, turns) == ("c", SAID, turns[:2]), "the base wasn't asked last"
    assert _Tab.undo(SAID, SAID) == ("hello", [], [])


class Scripted:
    """A parlour that answers what it is told to, or refuses."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.asked = answers, 0

    def answer(self, *_: Any) -> Any:
        self.asked += 1
        if not self.answers:
            raise UserError("Busy.")
        yield from self.answers


def last(chat: _Tab, what: str, side: bool, text: str, base: Any, adapter: Any) -> Any:
    """What the visitor sees in the end: message, base's and adapter's conversation."""
    request: Any = SimpleNamespace(session_hash="me")
    how = ("", "", "", *(start for *_, start in _SLIDERS.values()))
    shown = list(getattr(chat, what)(request, "a-run", side, text, base, adapter, *how))
    return shown[-1][:3]


def test_what_fails_leaves_message_and_conversations(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    chat.parlour = Scripted()  # type: ignore[assignment]
    assert last(chat, "send", True, "more", SAID, SAID) == ("more", SAID, SAID)
    assert last(chat, "again", True, "", SAID, SAID) == ("hello", SAID, SAID)


def test_a_stopped_base_is_not_followed_by_the_adapter(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    for stopped, asked in ((False, 2), (True, 1)):
        chat.parlour = Scripted(Answer("hi", 1, 1.0, stopped))  # type: ignore[assignment]
        text, base, adapter = last(chat, "again", True, "", SAID, SAID)
        assert (text, base, chat.parlour.asked) == ("", SAID, asked)  # type: ignore[attr-defined]
        assert adapter == ([] if stopped else SAID)
