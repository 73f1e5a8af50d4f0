"""Events as lines of JSON, and back."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest

from jetson_ft.errors import Message
from jetson_ft.events import KINDS, Event, Step, Warned, from_json, to_json


def example(cls: type[Event]) -> Event:
    return cls(**{f.name: f"{f.name}-value" for f in fields(cls) if f.name not in ("t", "attempt")})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_back_as_it_was_written(kind: str) -> None:
    event = example(KINDS[kind])
    line = json.loads(json.dumps(to_json(event)))
    assert line["kind"] == kind and {"schema", "t", "attempt"} <= line.keys()
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
    assert from_json(line) is None


def test_fields_of_later_versions_are_ignored() -> None:
    assert from_json({"kind": "exit", "code": 3, "later": 1}) == KINDS["exit"](code=3)  # type: ignore[call-arg]
