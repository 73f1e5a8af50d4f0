"""Turns become messages: roles, what is trained on, calls of tools."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from jetson_ft.data.formats import RowError, read_tools, read_turns

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns_of(*turns: Any) -> list[Any]:
    return read_turns(list(turns), "messages", set())


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Human", "user"), ("human ", "user"), ("USER", "user"), ("用户", "user"),
        ("gpt ", "assistant"), ("Assistant", "assistant"), ("chatgpt", "assistant"),
        ("bot", "assistant"), ("model", "assistant"), ("助手", "assistant"),
        ("developer", "system"), ("System", "system"), ("observation", "tool"),
    ],
)  # fmt: skip
def test_role_is_known_by_each_of_its_names(name: str, role: str) -> None:
    expected = [{"role": role, "content": "t"}]
    assert turns_of({"from": name, "value": "t"}) == expected
    assert turns_of({"role": name, "content": "t", "from": None, "value": None}) == expected


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
def test_answer_that_is_not_to_be_trained_on_is_marked(key: str) -> None:
    for no in (0, 0.0, False):
        assert turns_of({**ASSISTANT, key: no}) == [{**ASSISTANT, "train": False}]
        assert turns_of({"user": "q", "assistant": "a", key: no})[1]["train"] is False
        assert turns_of({**USER, key: no}) == [USER]
    for yes in (1, 1.0, True, None):
        assert turns_of({**ASSISTANT, key: yes}) == [ASSISTANT]


@pytest.mark.parametrize("value", [0.5, 2, "no", [0]])
def test_other_weight_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match=r"^`weight` is neither 1 nor 0"):
        turns_of({**ASSISTANT, "weight": value})


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def calls_of(*turns: Any) -> list[Any]:
    (message,) = turns_of(*turns)
    assert message["role"] == "assistant"
    return list(json.loads(message["tool_calls"]))


@pytest.mark.parametrize(
    "value", [
        '{"name": "f", "arguments": {"x": 1}}', '[{"name": "f", "arguments": {"x": 1}}]',
        '{"name": "f", "arguments": "{\\"x\\": 1}"}', {"name": "f", "arguments": {"x": 1}},
    ],
)  # fmt: skip
def test_function_call_of_sharegpt_is_a_tool_call(value: Any) -> None:
    assert calls_of({"from": "function_call", "value": value}) == [call(x=1)]


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_tool_calls_of_openai_are_read(content: str | None) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "2", "type": "function", "function": {"name": "f", "arguments": '{"x": "汉"}'}},
    ]
    for value in (calls, json.dumps(calls)):
        turn = {"role": "assistant", "content": content, "tool_calls": value}
        assert calls_of(turn) == [call(), call(x="汉")]
        assert turns_of(turn)[0]["content"] == (content or "")
    legacy = {"role": "assistant", "content": content, "function_call": calls[1]["function"]}
    assert calls_of(legacy) == [call(x="汉")]


def test_function_calls_in_succession_belong_to_one_message() -> None:
    turn = {"from": "function_call", "value": '{"name": "f"}'}
    assert calls_of(turn, turn) == [call(), call()]
    assert calls_of({"from": "gpt", "value": "I look."}, turn) == [call()]
    text = {"from": "gpt", "value": "I look."}
    (message,) = turns_of({**text, "loss": False}, {**turn, "loss": False})
    assert (message["content"], message["train"]) == ("I look.", False)


def test_call_that_is_marked_otherwise_than_its_text_or_another_call_is_refused() -> None:
    turn = {"from": "function_call", "value": '{"name": "f"}'}
    for first in (turn, {"from": "gpt", "value": "I look."}):
        for marks in ((0, 1), (1, 0), (None, 0), (0, None)):
            earlier, later = ({**t, "weight": m} for t, m in zip((first, turn), marks, strict=True))
            with pytest.raises(RowError, match="are marked differently"):
                turns_of(earlier, later)
        assert "train" not in turns_of({**first, "weight": 1}, turn)[0]


@pytest.mark.parametrize(
    "value",
    ["f(x)", "{", "[1]", "null", "{}", '{"name": 1}', '{"name": "f", "arguments": [1]}',
     '{"name": "f", "arguments": "x"}', None, 5],
)  # fmt: skip
def test_malformed_call_is_refused_by_name(value: Any) -> None:
    with pytest.raises(RowError, match=r"^`value` is not a tool call"):
        turns_of({"from": "function_call", "value": value})


def test_malformed_tool_calls_are_refused_by_name() -> None:
    for value in ("f", [1], [{"function": {}}], 5, {"x": 1}):
        with pytest.raises(RowError, match=r"^`tool_calls` is not a tool call"):
            turns_of({**ASSISTANT, "tool_calls": value})


@pytest.mark.parametrize("value", [datetime.date(2020, 1, 1), b"ab"])
def test_value_of_parquet_that_json_has_not_is_refused_by_name(value: object) -> None:
    with pytest.raises(RowError, match=r"^`function_call` has a value that JSON has not"):
        turns_of({**ASSISTANT, "function_call": {"name": "f", "arguments": {"x": value}}})
    with pytest.raises(RowError, match=r"^`tools` has a value that JSON has not"):
        read_tools({"tools": [{"name": "f", "x": value}]}, "tools")


def test_deeply_nested_call_is_refused() -> None:
    value = '{"name": "f", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}"
    try:
        turns_of({"from": "function_call", "value": value})
    except RowError as error:
        assert "value" in str(error.reason)
