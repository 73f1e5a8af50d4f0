"""Layouts are told apart, and every unusable row gets a reason that can be counted."""

from __future__ import annotations

from typing import Any

import pytest

from jetson_ft.data.formats import Layout, RowError, detect, normalise

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
def test_detected_and_normalised(
    value: dict[str, Any], layout: Layout, messages: list[dict[str, str]]
) -> None:
    assert detect(value) == layout
    assert normalise(value, layout) == messages


@pytest.mark.parametrize("value", [{}, {"text": "a"}, {"instruction": "q"}, {"output": "a"}])
def test_unknown_layout(value: dict[str, Any]) -> None:
    assert detect(value) is None


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
        ({"instruction": "q", "input": ["x"], "output": "a"}, "`input` is not text"),
        ({"instruction": "q", "output": "a", "system": 1}, "`system` is not text"),
        ({"instruction": "q", "output": "a", "history": "x"}, "`history` is not a list"),
        (
            {"instruction": "q", "output": "a", "history": [["q"]]},
            "`history` is not a list of pairs",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["q", None]]},
            "`history` holds what is not text",
        ),
        ({"instruction": "q", "output": "a\ufffd"}, "damaged text"),
        ({"instruction": "\ud83d", "output": "a"}, "damaged text"),
    ],
)
def test_unusable_pairs(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        normalise(value, "alpaca")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "`messages` is not a list"),
        ([], "no messages"),
        ([SYSTEM], "no messages"),
        (["q", "a"], "`messages` holds what is not an object"),
        ([USER], "the last message is not the assistant's"),
        ([USER, ASSISTANT, USER], "the last message is not the assistant's"),
        ([ASSISTANT], "user and assistant do not alternate"),
        ([USER, USER, ASSISTANT], "user and assistant do not alternate"),
        ([USER, SYSTEM, ASSISTANT], "a system message that is not the first"),
        ([{"role": "tool", "content": "q"}, ASSISTANT], "a role other than"),
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
def test_unusable_conversations(turns: Any, reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        normalise({"messages": turns}, "messages")


def test_missing_list_is_named() -> None:
    with pytest.raises(RowError, match="field `conversations` missing"):
        normalise({}, "sharegpt")
