"""Layouts are detected, and every unusable row gets a reason that can be counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from jetson_ft import recipe
from jetson_ft.cli import data as cli_data
from jetson_ft.data.formats import LAYOUTS, RowError, detect_layout, to_messages
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
    assert to_messages(value, layout) == messages


@pytest.mark.parametrize("value", [{}, {"text": "a"}, {"instruction": "q"}, {"output": "a"}])
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
    ],
)
def test_unusable_columns_have_a_reason(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        to_messages(value, "alpaca")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "`messages` is not a list"),
        ([], "no messages"),
        ([SYSTEM], "no messages"),
        (["q", "a"], "`messages` has an item that is not an object"),
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
def test_unusable_conversation_has_a_reason(turns: Any, reason: str) -> None:
    with pytest.raises(RowError, match=f"^{reason}"):
        to_messages({"messages": turns}, "messages")


def test_missing_list_is_reported() -> None:
    with pytest.raises(RowError, match="field `conversations` missing"):
        to_messages({}, "sharegpt")


def test_every_layout_of_the_recipe_is_converted_and_documented() -> None:
    assert set(LAYOUTS) == set(get_args(recipe.Layout))
    options = get_args(get_type_hints(cli_data.inspect)["layout"])  # a copy: no pydantic for help
    assert options == ("auto", *get_args(recipe.Layout))
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}` | " in page for name in LAYOUTS)
