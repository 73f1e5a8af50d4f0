"""Messages that are read from files."""

from __future__ import annotations

from typing import Any

import pytest

from jetson_ft.errors import Message


def nested(depth: int) -> dict[str, Any]:
    """Return a message whose text is four times as long with each level."""
    message: dict[str, Any] = {"template": "abcd", "values": {}}
    for _level in range(depth):
        message = {"template": "{a}{a}{a}{a}", "values": {"a": message}}
    return message


def test_message_of_a_file_may_not_grow_without_bound() -> None:
    assert len(str(Message.from_json(nested(3)))) == 4**4
    for depth in (10, 19):
        with pytest.raises(ValueError, match="too long a text"):
            Message.from_json(nested(depth))
    wide = {"template": "{a}" * 100_000, "values": {"a": {"template": "b" * 1000, "values": {}}}}
    with pytest.raises(ValueError, match="too long a template"):
        Message.from_json(wide)
