"""What a row says about learning, and calls of tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jetson_ft.data.formats import RowError
from jetson_ft.data.layouts import LAYOUTS, detect_layout, to_conversation

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


# What a row says about learning


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": [USER, ASSISTANT], "rejected_response": "b"},
        {"conversations": [USER], "chosen": ASSISTANT, "rejected": ASSISTANT},
        {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER], "messages": [USER]},
    ],
)
def test_preference_pair_is_refused_by_name(value: dict[str, Any]) -> None:
    for layout in LAYOUTS:
        with pytest.raises(RowError, match=r"^a preference pair: `rejected"):
            to_conversation(value, layout)


@pytest.mark.parametrize("label", [False, "False", "false "])
def test_unwanted_answer_is_refused_by_name(label: Any) -> None:
    with pytest.raises(RowError, match=r"^an unwanted answer: `label` is false"):
        to_conversation({"prompt": "q", "completion": "a", "label": label}, "alpaca")


@pytest.mark.parametrize("key", ["Label", " LABEL", "KTO_tag"])
def test_label_is_read_in_any_letter_case(key: str) -> None:
    with pytest.raises(RowError, match=f"^an unwanted answer: `{key}` is false"):
        to_conversation({"prompt": "q", "completion": "a", key: False}, "alpaca")


def test_wanted_answer_and_other_labels_are_read() -> None:
    for label in (True, 0, "no", None, "falsehood"):
        row = {"prompt": "q", "completion": "a", "label": label}
        assert to_conversation(row, "alpaca").messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"instruction": "q", "output": ["a", "b"]}, "output"),
        ({"instruction": "q", "answers": ["a"]}, "answers"),
        ({"instruction": "q", "completions": [{"model": "m", "response": "a"}]}, "completions"),
        ({"messages": [{"question": "q", "answer": ["a"]}]}, "answer"),
    ],
)
def test_list_of_answers_is_refused_by_name(value: dict[str, Any], key: str) -> None:
    layout = detect_layout(value)
    assert layout is not None
    with pytest.raises(RowError, match=f"^`{key}` is a list of answers, not one answer"):
        to_conversation(value, layout)


def test_row_without_a_trained_answer_is_unusable() -> None:
    unwanted = {**ASSISTANT, "weight": 0}
    with pytest.raises(RowError, match=r"^every answer is marked as not to be trained on"):
        to_conversation({"messages": [USER, unwanted, USER, unwanted]}, "messages")


@pytest.mark.parametrize("text", ["\u200b", "　 ", "\ufeff\n", "\u2060"])
def test_invisible_answer_is_no_answer(text: str) -> None:
    with pytest.raises(RowError, match=r"^no answer"):
        to_conversation({"instruction": "q", "output": text}, "alpaca")


def test_columns_with_content_that_are_not_read_are_listed() -> None:
    value = {
        "messages": [USER, {**ASSISTANT, "reasoning_content": "r", "name": None}],
        "metadata": {"x": 1}, "id": 0, "empty": "", "none": None,
    }  # fmt: skip
    unread = ["id", "messages[].reasoning_content", "metadata"]
    assert to_conversation(value, "messages").unread == unread


# Tools

CALL = {"role": "assistant", "content": "", "tool_calls": json.dumps(
    [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
)}  # fmt: skip
RESULT = {"role": "tool", "content": "r"}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER, CALL, RESULT, ASSISTANT], None),
        ([USER, CALL], None),
        ([USER, CALL, RESULT, RESULT, CALL, RESULT, ASSISTANT, USER, ASSISTANT], None),
        ([USER, CALL, {"role": "tool", "content": ""}, ASSISTANT], None),
        ([USER, CALL, RESULT], "the last message is not the assistant's"),
        ([USER, CALL, USER, ASSISTANT], "user after call"),
        ([USER, RESULT, ASSISTANT], "tool after user"),
        ([USER, ASSISTANT, RESULT, ASSISTANT], "tool after assistant"),
        ([USER, CALL, RESULT, USER, ASSISTANT], "user after tool"),
    ],
)
def test_messages_of_tools_are_between_a_call_and_the_answer(
    turns: list[Any], reason: str | None
) -> None:
    if reason is None:
        assert to_conversation({"messages": turns}, "messages").messages == turns
    else:
        with pytest.raises(RowError, match=reason):
            to_conversation({"messages": turns}, "messages")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "tools",
    [[TOOL], json.dumps([TOOL]), [TOOL["function"]], TOOL, json.dumps([TOOL["function"]])],
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_read_as_openai_tools(tools: Any, key: str) -> None:
    value = {"messages": [USER, ASSISTANT], key: tools}
    assert json.loads(to_conversation(value, "messages").tools) == [TOOL]


@pytest.mark.parametrize("tools", [None, "", [], "[]", "null"])
def test_empty_tools_are_none(tools: Any) -> None:
    assert to_conversation({"messages": [USER, ASSISTANT], "tools": tools}, "messages").tools == ""


@pytest.mark.parametrize("tools", ["{", "f", [1], [{"x": 1}], 5, [{"function": "f"}]])
def test_malformed_tools_are_refused_by_name(tools: Any) -> None:
    with pytest.raises(RowError, match=r"^`tools` is not a list of tools"):
        to_conversation({"messages": [USER, ASSISTANT], "tools": tools}, "messages")
