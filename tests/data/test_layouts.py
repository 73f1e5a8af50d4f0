"""Layouts are detected, and every unusable row gets a reason that can be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft import recipe
from jetson_ft.cli import data as cli_data
from jetson_ft.data.formats import RowError
from jetson_ft.data.layouts import LAYOUTS, detect_layout, to_conversation
from jetson_ft.recipe import Layout

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("value", "layout", "messages"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", [USER, ASSISTANT]),
        (
            {"instruction": "q", "input": "x", "output": "a"},
            "alpaca",
            [{"role": "user", "content": "q\nx"}, ASSISTANT],
        ),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]},
            "alpaca",
            [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
        ),
        ({"prompt": "q", "response": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"prompt": "q", "completion": "a"}, "alpaca", [USER, ASSISTANT]),
        ({"question": "q", "answer": "a", "id": 7}, "alpaca", [USER, ASSISTANT]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            [USER, ASSISTANT],
        ),
        (
            {
                "conversations": [
                    {"from": "user", "value": "q"},
                    {"from": "assistant", "value": "a"},
                ],
                "system": "s",
            },
            "sharegpt",
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, "messages", [SYSTEM, USER, ASSISTANT]),
        (
            {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]},
            "messages",
            [USER, ASSISTANT],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}],
                    },
                    ASSISTANT,
                ]
            },
            "messages",
            [{"role": "user", "content": "q!"}, ASSISTANT],
        ),
    ],
)
def test_row_of_each_layout_is_detected_and_converted(
    value: dict[str, Any], layout: Layout, messages: list[dict[str, str]]
) -> None:
    assert detect_layout(value) == layout
    assert to_conversation(value, layout).messages == messages


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("query", "response"), ("instruction", "response"), ("input", "output"), ("问题", "答案"),
        ("input", "target"), ("question", "response"), ("prompt", "answer"), ("query", "answer"),
        (" Question", "ANSWER "),
    ],
)  # fmt: skip
def test_question_and_answer_columns_are_detected_by_their_names(
    question: str, answer: str
) -> None:
    value = {"kind": "x", question: "q", answer: "a"}
    assert detect_layout(value) == "alpaca"
    assert to_conversation(value, "alpaca") == ([USER, ASSISTANT], "", ["kind"])


def test_most_specific_pair_is_read_and_the_others_are_reported() -> None:
    value = {"prompt": "p", "input": "x", "question": "q", "output": "o", "answer": "a"}
    messages, _tools, unread = to_conversation(value, "alpaca")
    assert messages == [{"role": "user", "content": "q\nx"}, ASSISTANT]
    assert unread == ["output", "prompt"]


def test_columns_that_are_null_are_passed_over() -> None:
    joined = {"instruction": None, "output": None, "question": "q", "answer": "a"}
    assert to_conversation(joined, "alpaca").messages == [USER, ASSISTANT]
    empty = {"conversations": None, "dialog": [USER, ASSISTANT]}
    assert detect_layout(empty) == "sharegpt"
    assert to_conversation(empty, "sharegpt").messages == [USER, ASSISTANT]
    systems = {"question": "q", "answer": "a", "system": "", "system_prompt": "s"}
    assert to_conversation(systems, "alpaca").messages == [SYSTEM, USER, ASSISTANT]


@pytest.mark.parametrize("key", ["conversation", "conversations", "dialog", "dialogue", "Messages"])
def test_list_of_messages_is_detected_by_its_name(key: str) -> None:
    for turns in ([USER, ASSISTANT], json.dumps([USER, ASSISTANT])):
        layout = detect_layout({key: turns, "category": "c"})
        assert layout == ("messages" if key == "Messages" else "sharegpt")
        assert to_conversation({key: turns}, layout).messages == [USER, ASSISTANT]


def test_pair_is_read_beside_an_empty_or_textual_conversation() -> None:
    pair = {"instruction": "q", "output": "a"}
    assert detect_layout({"messages": [], **pair}) == "alpaca"
    assert detect_layout({"messages": None, **pair}) == "alpaca"
    assert detect_layout({"conversation": "a text", **pair}) == "alpaca"
    assert detect_layout({"messages": []}) == "messages"


def test_turns_of_question_and_answer_are_read() -> None:
    for first, second in (("human", "assistant"), ("user", "bot"), ("query", "response")):
        value = {"conversation": [{first: "q", second: "a"}, {first: "q", second: "a"}]}
        expected = [USER, ASSISTANT, USER, ASSISTANT]
        assert to_conversation(value, "sharegpt").messages == expected


def moss(**changes: str) -> dict[str, Any]:
    turn = {
        "Human": "<|Human|>: q<eoh>\n",
        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n",
        "MOSS": "<|MOSS|>: a<eom>\n",
    }
    chat = {f"turn_{number}": dict(turn) for number in (10, 2)}
    chat["turn_2"] |= changes
    return {"meta_instruction": "s", "chat": chat}


def test_moss_rows_are_read_in_the_order_of_their_turns_without_marks() -> None:
    value = moss(Human="q2")
    assert detect_layout(value) == "sharegpt"
    messages, _tools, unread = to_conversation(value, "sharegpt")
    first = {"role": "user", "content": "q2"}
    assert messages == [SYSTEM, first, ASSISTANT, USER, ASSISTANT]
    assert unread == []


def test_moss_turn_with_a_very_long_number_is_the_last() -> None:
    value = moss()
    value["chat"][f"turn_{'9' * 5000}"] = {"Human": "last", "MOSS": "a"}
    assert to_conversation(value, "sharegpt").messages[-2]["content"] == "last"


def test_moss_commands_are_refused_and_thoughts_reported() -> None:
    value = moss(**{"Inner Thoughts": "<|Inner Thoughts|>: think<eot>"})
    assert to_conversation(value, "sharegpt").unread == ["chat[].Inner Thoughts"]
    with pytest.raises(RowError, match="a command to one of MOSS's tools"):
        to_conversation(moss(Commands='<|Commands|>: Search("x")<eoc>'), "sharegpt")


def test_belle_dialogue_in_the_question_is_split_into_turns() -> None:
    value = {"instruction": "Human:q\nAssistant:a\nHuman：q\nAssistant:\n", "output": "a"}
    expected = [USER, ASSISTANT, USER, ASSISTANT]
    assert to_conversation(value, "alpaca").messages == expected


@pytest.mark.parametrize(
    "text",
    [
        "Human: q\nAssistant: a\nSummarise the above.",
        "Who wrote this?\nHuman: q\nAssistant:",
        "Assistant: a\nHuman: q\nAssistant:",
        "Human: q\nAssistant: a\nHuman:",
        "Human: q\nHuman: r\nAssistant:",
        "Human beings",
    ],
)
def test_text_that_only_mentions_a_dialogue_stays_one_question(text: str) -> None:
    messages = to_conversation({"instruction": text, "output": "a"}, "alpaca").messages
    assert messages == [{"role": "user", "content": text}, ASSISTANT]


def test_context_is_before_the_question_and_input_after_it() -> None:
    value = {"context": "c", "instruction": "q", "input": "x", "response": "a"}
    assert to_conversation(value, "alpaca").messages[0]["content"] == "c\nq\nx"
    assert to_conversation({**value, "context": " "}, "alpaca").messages[0]["content"] == "q\nx"


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "null", " <noinput> "])
@pytest.mark.parametrize("key", ["input", "context", "system", "history"])
def test_placeholder_in_an_optional_column_is_no_content_and_reported(key: str, text: str) -> None:
    value = {"instruction": "q", "output": "a", key: text}
    expected = ([USER, ASSISTANT], "", [f"{key}: {text.strip()}"])
    assert to_conversation(value, "alpaca") == expected


def test_nan_is_no_content() -> None:
    value = {"instruction": "q", "output": "a", "input": float("nan")}
    assert to_conversation(value, "alpaca").messages == [USER, ASSISTANT]
    with pytest.raises(RowError, match="no answer"):
        to_conversation({"instruction": "q", "output": "nan"}, "alpaca")


@pytest.mark.parametrize(
    "history",
    [
        [["q", "a"]],
        [{"user": "q", "assistant": "a"}],
        [{"instruction": "q", "output": "a"}],
        [USER, ASSISTANT],
        ["q", "a"],
        [None, ["", ""], [], {}, ["q", "a"]],
        '[["q", "a"]]',
    ],
)
def test_history_is_read_in_each_form(history: Any) -> None:
    value = {"instruction": "q", "output": "a", "history": history}
    expected = [USER, ASSISTANT, USER, ASSISTANT]
    assert to_conversation(value, "alpaca").messages == expected


@pytest.mark.parametrize("history", [None, [], "", " ", "[]", [[]], [None]])
def test_empty_history_is_none(history: Any) -> None:
    value = {"instruction": "q", "output": "a", "history": history}
    assert to_conversation(value, "alpaca").messages == [USER, ASSISTANT]


def test_system_column_equal_to_the_system_message_is_one_message() -> None:
    value = {"system": "s", "messages": [SYSTEM, USER, ASSISTANT]}
    assert to_conversation(value, "messages").messages == [SYSTEM, USER, ASSISTANT]
    with pytest.raises(RowError, match="a system message that is not the first"):
        to_conversation({**value, "system": "other"}, "messages")


def test_system_prompt_is_the_system_message() -> None:
    value = {"system_prompt": "s", "question": "q", "response": "a"}
    assert to_conversation(value, "alpaca").messages == [SYSTEM, USER, ASSISTANT]


# Chosen columns


@pytest.mark.parametrize(
    ("columns", "value", "messages"),
    [
        ({"question": "title", "answer": "body"}, {"title": "q", "body": "a"}, [USER, ASSISTANT]),
        (
            {"question": "output", "answer": "instruction"},
            {"instruction": "a", "output": "q"},
            [USER, ASSISTANT],
        ),
        (
            {"question": "t", "answer": "b", "system": "r", "context": "c", "history": "h"},
            {"t": "q", "b": "a", "r": "s", "c": "c", "h": [["q", "a"]]},
            [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "c\nq"}, ASSISTANT],
        ),
        ({"messages": "turns"}, {"turns": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        (
            {"question": "t", "answer": "b"},
            {"messages": [USER, USER], "t": "q", "b": "a"},
            [USER, ASSISTANT],
        ),
        # the wanted answer of a preference pair: a text, a message, a conversation
        ({"answer": "chosen"}, {"prompt": "q", "chosen": "a", "rejected": "b"}, [USER, ASSISTANT]),
        (
            {"answer": "chosen"},
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
            [USER, ASSISTANT],
        ),
        (
            {"answer": "chosen"},
            {"conversations": [USER], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
            [USER, ASSISTANT],
        ),
        (
            {"messages": "chosen"},
            {"messages": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
            [USER, ASSISTANT],
        ),
    ],
)
def test_chosen_columns_are_read(
    columns: dict[str, str], value: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    layout = detect_layout(value, columns)
    assert layout is not None
    assert to_conversation(value, layout, columns).messages == messages


def test_chosen_column_of_messages_that_is_a_text_is_refused_by_name() -> None:
    row = {"chosen": "Human: q", "rejected": "Human: r"}
    assert detect_layout(row, {"messages": "chosen"}) == "messages"
    with pytest.raises(RowError, match=r"^`chosen` is not a list"):
        to_conversation(row, "messages", {"messages": "chosen"})


def test_row_without_a_chosen_column_is_unusable() -> None:
    with pytest.raises(RowError, match="field `body` missing"):
        to_conversation({"question": "q", "answer": "a"}, "alpaca", {"answer": "body"})


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["user", "gpt", "function_call", '[{"name": "f"}]', "Human:\nAssistant:"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "role", "from", "value", "content", "tool_calls", "weight", "human", "assistant",
            "name", "arguments", "function", "Human", "Commands", "MOSS", "turn_1", "x",
        ]),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
_NAMES = [
    "messages", "conversations", "chat", "instruction", "input", "output", "history", "system",
    "context", "tools", "label", "rejected", "chosen", "answers", "Question", "x",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=5),
    st.dictionaries(
        st.sampled_from(["question", "answer", "context", "system", "history", "messages"]),
        st.sampled_from(_NAMES),
        max_size=2,
    ),
)
def test_any_row_is_a_conversation_in_order_or_a_row_error(
    row: dict[str, Any], columns: dict[str, str]
) -> None:
    detected = detect_layout(row, columns)
    for layout in LAYOUTS if detected is None else [detected]:
        try:
            messages, tools, _unread = to_conversation(row, layout, columns)
        except RowError as error:
            assert str(error.reason)
            continue
        assert messages[-1]["role"] == "assistant"
        assert not tools or json.loads(tools)
        for message in messages:
            calls = message.get("tool_calls")
            assert message["content"].strip() or message["role"] == "tool" or json.loads(calls)


@pytest.mark.parametrize("value", [{}, {"instruction": "q"}, {"output": "a"}])
def test_row_of_unknown_layout_is_not_detected(value: dict[str, Any]) -> None:
    assert detect_layout(value) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"instruction": "q"}, "field `output` missing"),
        ({"output": "a"}, "field `instruction` missing"),
        ({"completion": "a"}, "field `prompt` missing"),
        ({}, "field `instruction` missing"),
        ({"instruction": "q", "output": None}, "`output` is null"),
        ({"instruction": 3, "output": "a"}, "`instruction` is not text"),
        ({"instruction": "q", "output": " \n"}, "no answer"),
        ({"instruction": "", "output": "a"}, "no question"),
        ({"prompt": [{"role": "system", "content": " "}], "completion": "a"}, "no question"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "`input` is not text"),
        ({"instruction": "q", "output": "a", "system": 1}, "`system` is not text"),
        ({"instruction": "q", "output": "a", "history": "x"}, "`history` is not a list"),
        (
            {"instruction": "q", "output": "a", "history": [["q"]]},
            "`history` is not a list of pairs",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["q", None]]},
            "`history` has an item that is not text",
        ),
        ({"instruction": "q", "output": "a\ufffd"}, "damaged text"),
        ({"instruction": "\ud83d", "output": "a"}, "damaged text"),
        ({"instruction": "q", "output": "a", "tools": '[{"name": "\ufffd"}]'}, "damaged text"),
    ],
)
def test_unusable_columns_have_a_reason(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        to_conversation(value, "alpaca")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "`messages` is not a list"),
        ([], "no messages"),
        ([SYSTEM], "no messages"),
        (["q", "a"], "`messages` has an item that is not an object"),
        ([USER], "the last message is not the assistant's"),
        ([USER, ASSISTANT, USER], "the last message is not the assistant's"),
        ([ASSISTANT], "user and assistant do not alternate: assistant first"),
        ([ASSISTANT, USER, ASSISTANT], "user and assistant do not alternate: assistant first"),
        ([USER, USER, ASSISTANT], "user and assistant do not alternate: user after user"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "a system message that is not the first"),
        ([USER, SYSTEM, ASSISTANT], "a system message that is not the first"),
        ([{"role": "humna", "content": "q"}, ASSISTANT], "unknown role `humna`$"),
        ([{"role": "x" * 500, "content": "q"}, ASSISTANT], "unknown role `x{20}`$"),
        ([{"role": "tool", "content": "q"}, ASSISTANT], "user and assistant do not alternate"),
        ([{"content": "q"}, ASSISTANT], "field `role` missing"),
        ([{"role": ["user"], "content": "q"}, ASSISTANT], "`role` is not text"),
        ([{"role": "user"}, ASSISTANT], "field `content` missing"),
        ([USER, {"role": "assistant", "content": None}], "`content` is null"),
        ([USER, {"role": "assistant", "content": ""}, USER, ASSISTANT], "no answer"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT],
            "`content` has a part that is not text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}, ASSISTANT], "field `text` missing"),
    ],
)
def test_unusable_conversation_has_a_reason(turns: Any, reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        to_conversation({"messages": turns}, "messages")


def test_missing_list_is_reported() -> None:
    with pytest.raises(RowError, match="field `conversations` missing"):
        to_conversation({}, "sharegpt")


def test_every_layout_of_the_recipe_is_converted_and_documented() -> None:
    assert set(LAYOUTS) == set(get_args(recipe.Layout))
    options = get_args(get_type_hints(cli_data.inspect)["layout"])  # a copy: no pydantic for help
    assert options == ("auto", *get_args(recipe.Layout))
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}` | " in page for name in LAYOUTS)
