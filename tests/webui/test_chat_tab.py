"""The chat tab: the models it offers, its conversations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_folders import make_run

from jetson_ft.chat.client import ChatClient, ChatReply
from jetson_ft.errors import UserError
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.chat import _SLIDERS, BASE, ChatTab

TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def tab(root: Path) -> ChatTab:
    return ChatTab(Locale("en"), root, ChatClient(root))


def value(update: Any) -> Any:
    return update.value if hasattr(update, "value") else update["value"]


def test_the_newest_adapter_is_chosen_until_the_user_chooses(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    assert value(chat.open(BASE, False, [])) == BASE
    for name in ("20260101-000000-old", "20260102-000000-new"):
        make_run(tmp_path, name).adapter.mkdir()
    make_run(tmp_path, "20260103-000000-no-adapter-yet")
    assert value(chat.open(BASE, False, [])) == "20260102-000000-new"
    assert value(chat.open(BASE, True, [])) == BASE
    assert value(chat.open(BASE, False, TURNS)) == BASE, "a conversation is not interrupted"
    assert value(chat.open("a-deleted-one", True, TURNS)) == "20260102-000000-new"
    folder = str(tmp_path / "20260101-000000-old" / "adapter")
    (Path(folder) / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    for typed in ("microsoft/phi-1_5", "latest", folder):
        assert value(chat.open(typed, True, [])) == typed


def test_a_conversation_is_titled_base_or_adapter(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    assert [chat.title(name) for name in (BASE, "o/n", "a-run")] == ["Base", "Base", "Adapter"]
    request: Any = SimpleNamespace(session_hash="me")
    base, adapter, _ = chat.choose(request, "o/n")
    assert base == [] and adapter.label == "Base" and not adapter.value


def test_undo_removes_the_last_message_and_its_answers() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": [{"type": "text", "text": "c"}]}]  # fmt: skip
    assert ChatTab.undo([], turns) == ("c", [], turns[:2])
    assert ChatTab.undo([], []) == ("", [], [])
    assert ChatTab.undo(TURNS, turns) == ("c", TURNS, turns[:2]), (
        "the base's last message is another"
    )
    assert ChatTab.undo(TURNS, TURNS) == ("hello", [], [])


class Scripted:
    """A chat client with fixed answers; without any it raises."""

    def __init__(self, *answers: ChatReply) -> None:
        self.answers, self.calls = answers, 0

    def generate(self, *_: Any) -> Any:
        self.calls += 1
        if not self.answers:
            raise UserError("Busy.")
        yield from self.answers


def last(chat: ChatTab, method: str, side: bool, text: str, base: Any, adapter: Any) -> Any:
    """Return the last outputs: message, the base's and the adapter's conversation."""
    request: Any = SimpleNamespace(session_hash="me")
    settings = ("", "", "", *(option.default for option in _SLIDERS))
    outputs = list(getattr(chat, method)(request, "a-run", side, text, base, adapter, *settings))
    return outputs[-1][:3]


def test_a_failed_answer_keeps_message_and_conversations(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    chat.client = Scripted()  # type: ignore[assignment]
    assert last(chat, "send", True, "more", TURNS, TURNS) == ("more", TURNS, TURNS)
    assert last(chat, "again", True, "", TURNS, TURNS) == ("hello", TURNS, TURNS)


def test_an_error_in_the_examples_names_their_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: warnings.append(text))
    settings = ("", "[{", "", *(option.default for option in _SLIDERS))
    for language, words in (("en", ("Few-shot examples", "not valid JSON")),
                            ("zh_CN", ("示例", "不是有效的 JSON"))):  # fmt: skip
        chat = ChatTab(Locale(language), tmp_path, ChatClient(tmp_path))
        request: Any = SimpleNamespace(session_hash="me")
        (*_, last) = chat.send(request, "a-run", False, "hello", [], [], *settings)
        assert last == ("hello", [], [], "")
        assert all(word in warnings[-1] for word in words), warnings
        assert "/tmp" not in warnings[-1]


def test_after_a_stopped_base_the_adapter_does_not_answer(tmp_path: Path) -> None:
    chat = tab(tmp_path)
    for stopped, calls in ((False, 2), (True, 1)):
        chat.client = Scripted(ChatReply("hi", 1, 1.0, stopped))  # type: ignore[assignment]
        text, base, adapter = last(chat, "again", True, "", TURNS, TURNS)
        assert (text, base, chat.client.calls) == ("", TURNS, calls)  # type: ignore[attr-defined]
        assert adapter == ([] if stopped else TURNS)
