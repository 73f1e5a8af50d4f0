"""The chat tab: what its buttons do, with a scripted chat client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft.chat.client import ChatClient, ChatReply, ChatRequest
from jetson_ft.errors import UserError
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.chat_conversation import ChatTab
from jetson_ft.webui.tabs.chat_models import BASE, NONE, OWN_BASE
from jetson_ft.webui.tabs.chat_sampling import (
    PRESETS,
    SLIDERS,
    matching_preset,
    preset_values,
    read_sampling,
)
from jetson_ft.webui.tabs.chat_turns import Turn, align, dialogue, read_turns, show_turns

REQUEST: Any = SimpleNamespace(session_hash="me")
DEFAULTS = [option.default for option in SLIDERS]


class Scripted:
    """A chat client with fixed replies to each call; a call without any raises."""

    def __init__(self, *calls: list[ChatReply]) -> None:
        self.calls, self.requests = list(calls), list[tuple[str, ChatRequest]]()

    def generate(self, name: str, request: ChatRequest, client_id: str) -> Any:
        self.requests.append((name, request))
        if not self.calls:
            raise UserError("Busy.")
        yield from self.calls.pop(0)


def reply(text: str, stopped: bool = False, ended: bool = True) -> list[ChatReply]:
    return [ChatReply(text[:1]), ChatReply(text, 12, 1.0, stopped, ended)]


def messages(*turns: Turn) -> Any:
    return show_turns(Locale("en"), turns)


def value(update: Any) -> Any:
    return update["value"] if isinstance(update, dict) else update.value


class Page:
    """What a page shows, as the events of a tab change it."""

    def __init__(self, root: Path, *calls: list[ChatReply], second: str = NONE) -> None:
        self.client = Scripted(*calls)
        self.tab = ChatTab(Locale("en"), root, ChatClient(root))
        self.tab.client = self.client  # type: ignore[assignment]
        self.first, self.second, self.text = "a-run", second, ""
        self.panes: list[Any] = [[], []]
        self.examples = ""
        self.outputs: list[Any] = []

    def press(self, method: str, event: Any = None) -> None:
        form = (self.first, self.second, self.text, *self.panes, "", self.examples, "", *DEFAULTS)
        events = [event] if event else []
        self.outputs = list(getattr(self.tab, method)(REQUEST, *events, *form))
        for composer, *panes, _status in self.outputs:
            self.text, self.panes = composer.get("value", self.text), panes

    def send(self, text: str) -> None:
        self.text = text
        self.press("send")

    def turns(self) -> list[list[tuple[str, str]]]:
        return [[(t.question, t.answer) for t in read_turns(pane)] for pane in self.panes]


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: shown.append(text))
    return shown


def event(pane: int, **fields: Any) -> Any:
    return SimpleNamespace(target=SimpleNamespace(elem_id=("chat-a", "chat-b")[pane]), **fields)


# --- turns --------------------------------------------------------------------------------------


@settings(deadline=None)  # a machine under load is slow
@given(st.lists(st.tuples(st.text(min_size=1), st.text(), st.text(), st.booleans())))
def test_turns_are_read_as_they_are_shown(values: list[Any]) -> None:
    turns = [Turn(question, answer, note if answer else "", is_cut and bool(answer))
             for question, answer, note, is_cut in values]  # fmt: skip
    read = read_turns(messages(*turns))
    assert [(t.question, t.answer, t.is_cut) for t in read] == [
        (t.question, t.answer, t.is_cut) for t in turns
    ]
    assert [t.note for t in read if t.answer] == [t.note for t in turns if t.answer]


def test_code_keeps_its_indentation() -> None:
    code = "    if x:\n        return 1"
    (_question, answer) = messages(Turn("q", code))
    shown = gr.Chatbot().postprocess([answer])
    assert shown.root[0].content[0].text == code


def test_files_in_a_request_are_dropped() -> None:
    file = {"type": "file", "file": {"path": "/etc/passwd"}, "alt_text": "x"}
    request = [{"role": "user", "content": [{"type": "text", "text": "a"}, file]},
               {"role": "assistant", "content": file},
               {"role": "system", "content": "s"}]  # fmt: skip
    assert read_turns(request) == [Turn("a")]
    assert "passwd" not in str(show_turns(Locale("en"), read_turns(request)))


def test_only_the_last_answer_can_be_continued() -> None:
    shown = messages(Turn("a", "b", "n", True), Turn("c", "d", "n", True))
    assert [bool(message.get("options")) for message in shown] == [False, False, False, True]
    assert not messages(Turn("a", "b"))[-1].get("options")
    (_question, missing) = messages(Turn("a"))
    assert missing["options"][0]["label"] == "Answer"
    assert missing["metadata"]["log"] == "not answered"


def test_unanswered_questions_are_no_part_of_the_prompt() -> None:
    assert dialogue([Turn("a"), Turn("b", "c")]) == [
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
    ]  # fmt: skip


def test_panes_are_aligned_by_their_questions() -> None:
    turns = [Turn("a", "1"), Turn("b", "2"), Turn("c", "3")]
    assert align(turns, ["a", "x"]) == [Turn("a", "1"), Turn("x")]
    assert align([], ["a"]) == [Turn("a")]


# --- buttons ------------------------------------------------------------------------------------


def test_two_models_answer_the_question_in_their_own_conversations(tmp_path: Path) -> None:
    page = Page(
        tmp_path, reply("A1"), reply("B1"), reply("A2"), reply("B2"), second="another-run"
    )  # fmt: skip
    page.send("one")
    page.send(" two ")
    assert page.turns() == [[("one", "A1"), ("two", "A2")], [("one", "B1"), ("two", "B2")]]
    names = [name for name, _request in page.client.requests]
    assert names == ["a-run", "another-run"] * 2
    last = page.client.requests[-1][1]
    assert [turn["content"] for turn in last.turns] == ["one", "B1"] and last.text == "two"
    assert page.text == "" and read_turns(page.panes[0])[1].note == "12 tokens · 12/s"


def test_the_own_base_is_the_same_model_without_its_adapter(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("A"), reply("B"), second=OWN_BASE)
    page.send("q")
    asked = [(name, request.use_adapter) for name, request in page.client.requests]
    assert asked == [("a-run", True), ("a-run", False)]


def test_after_a_stop_both_panes_have_the_same_questions(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("A", stopped=True, ended=False), second="b")
    page.send("q")
    assert page.turns() == [[("q", "A")], [("q", "")]]
    assert read_turns(page.panes[0])[0].note.endswith("stopped")
    for _composer, _pane, waiting, _status in page.outputs[1:-1]:
        assert [message["role"] for message in waiting] == ["user"], "it may still be answered"
    page.client.calls = [reply("B")]
    page.press("proceed", event(1))
    assert page.turns() == [[("q", "A")], [("q", "B")]]


def test_a_cut_answer_is_continued(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("be", ended=False))
    page.send("q")
    assert read_turns(page.panes[0])[0].note == "12 tokens · 12/s · cut short"
    page.client.calls = [reply("begun")]
    page.press("proceed", event(0))
    assert page.client.requests[-1][1].prefill == "be"
    assert page.turns()[0] == [("q", "begun")] and not read_turns(page.panes[0])[0].is_cut


def test_an_edited_question_replaces_what_followed_in_both_panes(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("A"), reply("B"), second="b")
    page.panes = [messages(Turn("a", "1"), Turn("b", "2")), messages(Turn("a", "3"), Turn("b", ""))]
    page.press("edit", event(1, index=0, value="x"))
    assert page.turns() == [[("x", "A")], [("x", "B")]]
    page.client.calls = [reply("A"), reply("B")]
    page.panes = [messages(Turn("a", "1"), Turn("b", "2"))] * 2
    page.press("edit", event(0, index=[2, 0], value="y"))
    assert page.turns() == [[("a", "1"), ("y", "A")], [("a", "1"), ("y", "B")]]


def test_retry_answers_in_its_pane_alone(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("new"), second="b")
    page.panes = [
        messages(Turn("a", "1"), Turn("b", "2")),
        messages(Turn("a", "3"), Turn("b", "4")),
    ]
    page.press("retry", event(1, index=2))
    assert page.turns() == [[("a", "1"), ("b", "2")], [("a", "3"), ("b", "new")]]
    assert page.client.requests[0][1].prefill == ""


def test_any_answer_is_given_again_without_what_followed(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("new"), second="b")
    page.panes = [messages(Turn("a", "1"), Turn("b", "2")), messages(Turn("a", "3"), Turn("b", ""))]
    for place in ("2,0", "0,2", "-1,0", "x"):
        page.press("retry_any", place)
    assert page.turns()[0] == [("a", "1"), ("b", "2")] and not page.client.requests
    page.press("retry_any", "1,0")
    assert page.turns() == [[("a", "1")], [("a", "new")]]


def test_a_starter_begins_the_conversation(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("A"))
    page.press("start", event(0, value={"text": "why?"}))
    assert page.turns()[0] == [("why?", "A")]


def test_a_failed_answer_keeps_message_and_conversations(
    tmp_path: Path, warnings: list[str]
) -> None:
    page = Page(tmp_path, second="b")
    page.panes = [messages(Turn("a", "1")), messages(Turn("a", "3"))]
    page.send("more")
    assert page.text == "more" and page.turns() == [[("a", "1")], [("a", "3")]]
    assert warnings == ["Busy."]
    page.client.calls = [reply("A")]  # the second model fails
    page.send("more")
    assert page.text == "" and page.turns()[0][1] == ("more", "A")
    assert page.turns()[1][1] == ("more", ""), "what was answered is kept"


def test_while_an_answer_is_generated_stop_is_in_the_place_of_send(tmp_path: Path) -> None:
    page = Page(tmp_path, reply("A"))
    page.send("q")
    composers = [composer for composer, *_rest in page.outputs]
    buttons = [(bool(each["submit_btn"]), bool(each["stop_btn"])) for each in composers
               if "submit_btn" in each]  # fmt: skip
    assert buttons == [(False, True), (False, True), (True, False)]
    assert len(composers) > 3, "while the answer grows the button stays, to be clicked"
    assert "value" not in composers[-1], "what was typed meanwhile stays"


def test_an_empty_message_is_not_sent(tmp_path: Path) -> None:
    page = Page(tmp_path)
    page.send("  \n")
    assert not page.client.requests


def test_an_error_in_the_examples_names_their_field(tmp_path: Path, warnings: list[str]) -> None:
    for language, words in (("en", ("Few-shot examples", "not valid JSON")),
                            ("zh_CN", ("示例", "不是有效的 JSON"))):  # fmt: skip
        page = Page(tmp_path)
        page.tab.t = Locale(language)
        page.examples = "[{"
        page.send("hello")
        assert page.text == "hello" and not page.client.requests
        assert all(word in warnings[-1] for word in words), warnings
        assert "/tmp" not in warnings[-1]


def test_values_of_calls_by_hand_fail_plainly(tmp_path: Path, warnings: list[str]) -> None:
    page = Page(tmp_path)
    form = (None, None, None, None, None, None, None, "x", *DEFAULTS)
    assert list(page.tab.send(REQUEST, *form))[-1][1:3] == ([], [])
    list(page.tab.send(REQUEST, None, None, "q", *form[3:]))
    assert "whole number" in warnings[-1]


# --- sampling -----------------------------------------------------------------------------------


def test_presets_and_sliders_match() -> None:
    for name, (_label, sampling) in PRESETS.items():
        values = preset_values(name)
        assert matching_preset(*values) == name
        assert read_sampling("", [sampling.max_new_tokens, *values]) == sampling
    assert matching_preset(1.9, *preset_values("precise")[1:]) is None
    assert read_sampling("7", DEFAULTS).seed == 7
    assert read_sampling("", DEFAULTS) == PRESETS["precise"][1]
    with pytest.raises(UserError, match="whole number"):
        read_sampling("-1", DEFAULTS)


# --- opening ------------------------------------------------------------------------------------


def test_the_newest_adapter_is_chosen_until_the_user_chooses(tmp_path: Path) -> None:
    from run_folders import make_run

    def opened(first: Any, wanted: str = "", pane: Any = ()) -> tuple[Any, Any]:
        updates = tab.open(first, NONE, wanted, list(pane))
        return value(updates[0]), value(updates[1])

    tab = ChatTab(Locale("en"), tmp_path, ChatClient(tmp_path))
    assert opened(None) == (BASE, NONE)
    for name in ("20260101-000000-old", "20260102-000000-new"):
        make_run(tmp_path, name).adapter.mkdir()
    make_run(tmp_path, "20260103-000000-no-adapter-yet")
    assert opened(None)[0] == "20260102-000000-new"
    assert opened(BASE)[0] == BASE
    assert opened("a-deleted-one")[0] == "20260102-000000-new"
    assert opened("a-deleted-one", pane=[1])[0] == "a-deleted-one", "a conversation is kept"
    assert opened(BASE, "20260101-000000-old")[0] == "20260101-000000-old"
    folder = str(tmp_path / "20260101-000000-old" / "adapter")
    (Path(folder) / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    for typed in ("microsoft/phi-1_5", "latest", folder):
        assert opened(typed)[0] == typed


def test_another_model_begins_another_conversation(tmp_path: Path) -> None:
    tab = ChatTab(Locale("en"), tmp_path, ChatClient(tmp_path))
    for first, second, compared in (("o/n", "o/n", NONE), ("o/n", OWN_BASE, NONE),
                                    ("o/n", BASE, BASE)):  # fmt: skip
        updates = tab.choose(REQUEST, first, second)
        assert value(updates[1]) == first and value(updates[2]) == compared
        assert updates[3:] == ([], [])


def test_opening_a_list_keeps_what_is_chosen(tmp_path: Path) -> None:
    tab = ChatTab(Locale("en"), tmp_path, ChatClient(tmp_path))
    for update in tab.refresh(BASE):
        assert update["choices"] and "value" not in update, "another may be chosen meanwhile"
