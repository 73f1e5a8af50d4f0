"""Events as lines of JSON, and back."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest

from jetson_ft.errors import Message
from jetson_ft.events import KINDS, Event, Step, Warned, from_json, to_json


def example(cls: type[Event]) -> Event:
    """Return an event with a value of each field's type."""
    message = Message("{a}", {"a": 1}).as_json()
    values: dict[Any, Any] = {
        str: "text", int: 3, float: 0.5, bool: True, list[str]: ["a"], dict[str, int]: {"a": 1},
        dict[str, Any]: message,
    }  # fmt: skip
    content = {}
    for name, hint in get_type_hints(cls).items():
        if name not in ("kind", "t", "attempt"):
            content[name] = values[hint] if hint in values else values[get_args(hint)[0]]
    if "messages" in content:
        content["messages"] = dict.fromkeys(("what", "where", "fix"), message)
    return cls(**content)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_back_as_it_was_written(kind: str) -> None:
    event = example(KINDS[kind])
    line = json.dumps(to_json(event))
    content = json.loads(line)
    assert content["kind"] == kind and {"schema", "t", "attempt"} <= content.keys()
    assert from_json(line) == event


def test_numbers_that_are_not_finite_become_null_at_any_depth() -> None:
    step: dict[str, Any] = {f.name: 1 for f in fields(Step)} | {"loss": math.nan, "lr": math.inf}
    line = to_json(Step(**step))
    assert line["loss"] is None and line["lr"] is None and line["grad_norm"] == 1
    warning = Warned.of_message(Message("{x} and {y}", {"x": math.nan, "y": 2.0}))
    assert to_json(warning)["text"]["values"] == {"x": None, "y": 2.0}


@pytest.mark.parametrize(
    "line", [{"kind": "unknown"}, {"kind": []}, {"step": 1}, {"kind": "step", "step": 1}]
)
def test_a_line_of_another_shape_is_no_event(line: dict[str, Any]) -> None:
    assert from_json(json.dumps(line)) is None


def test_fields_of_later_versions_are_ignored() -> None:
    assert from_json('{"kind": "exit", "code": 3, "later": 1}') == KINDS["exit"](code=3)  # type: ignore[call-arg]


def test_gradient_of_any_size_is_read_back() -> None:
    """The norm of a gradient that explodes is what a person looks for."""
    event = example(Step)
    for norm in (1e30, 3.4e38, 1e45):
        exploded = replace(event, grad_norm=norm)  # type: ignore[call-arg]
        assert from_json(json.dumps(to_json(exploded))) == exploded


@pytest.mark.parametrize(
    "change", [{"step": 0}, {"step": -1}, {"grad_norm": 1e308}, {"tokens": 2**63}, {"attempt": -1}]
)
def test_step_with_an_impossible_number_is_no_event(change: dict[str, Any]) -> None:
    assert from_json(json.dumps({**to_json(example(Step)), **change})) is None
