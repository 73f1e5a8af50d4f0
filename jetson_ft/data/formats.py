"""The layouts that a row can have, and their conversion to messages.

`LAYOUTS` is the one table; its names are those of `data.format` (`recipe.Layout`). A row that
can't be used raises a `RowError` whose reason names no content, so that equal ones are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypedDict

from jetson_ft.errors import Message, _
from jetson_ft.recipe import Layout

Row = dict[str, Any]


class ChatMessage(TypedDict):
    """One message of a conversation; the role is `system`, `user` or `assistant`."""

    role: str
    content: str


class RowError(ValueError):
    """A row can't be used; `reason` says why, from a template and its values."""

    def __init__(self, template: str, **values: Any) -> None:
        self.reason = Message(template, values)
        super().__init__(self.reason)


NO_ANSWER = _("no answer")

_COLUMNS = (  # question, answer
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
)
_ROLES = {role: role for role in ("user", "assistant", "system")}
_ROLES |= {"human": "user", "gpt": "assistant"}
_DAMAGE = re.compile("[\ud800-\udfff\ufffd]")


def _columns_to_messages(row: Row) -> list[ChatMessage]:
    """Convert question and answer columns: the pairs of `history`, then the row's own pair."""
    # The pair with both columns; else the first with one, so that the error names the other.
    question, answer = max(_COLUMNS, key=lambda pair: (pair[0] in row) + (pair[1] in row))
    texts: list[str] = []
    for pair in _list(row, "history") if row.get("history") is not None else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(_("`{key}` is not a list of pairs"), key="history")
        if not all(isinstance(text, str) for text in pair):
            raise RowError(_("`{key}` has an item that is not text"), key="history")
        texts += pair
    parts = [_text(row, question), _optional_text(row, "input")]
    texts += ["\n".join(part for part in parts if part), _text(row, answer)]
    return [
        ChatMessage(role="assistant" if position % 2 else "user", content=text)
        for position, text in enumerate(texts)
    ]


def _turns_to_messages(row: Row, key: str) -> list[ChatMessage]:
    """Convert a list of turns; {from, value} and {role, content} are accepted in either layout."""
    messages = []
    for turn in _list(row, key):
        if not isinstance(turn, dict):
            raise RowError(_("`{key}` has an item that is not an object"), key=key)
        name = _text(turn, "from" if "from" in turn else "role")
        if name not in _ROLES:
            raise RowError(_("a role other than {roles}"), roles=", ".join(_ROLES))
        content_key = "value" if "value" in turn else "content"
        if isinstance(parts := turn.get(content_key), list):  # OpenAI's list of parts
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
                raise RowError(_("`{key}` has a part that is not text"), key=content_key)
            content = "".join(_text(part, "text") for part in parts)
        else:
            content = _text(turn, content_key)
        if _ROLES[name] != "system" or content.strip():
            messages.append(ChatMessage(role=_ROLES[name], content=content))
    return messages


# By layout, in the order of detection: whether a row has it; the row's messages without those of a
# `system` column.
LAYOUTS: dict[Layout, tuple[Callable[[Row], bool], Callable[[Row], list[ChatMessage]]]] = {
    # OpenAI: {role, content} each
    "messages": (lambda row: "messages" in row, lambda row: _turns_to_messages(row, "messages")),
    # ShareGPT: {from, value} each
    "sharegpt": (
        lambda row: "conversations" in row,
        lambda row: _turns_to_messages(row, "conversations"),
    ),
    # Alpaca: a question and an answer column, optional `input`, `history`
    "alpaca": (
        lambda row: any(question in row and answer in row for question, answer in _COLUMNS),
        _columns_to_messages,
    ),
}


def detect_layout(row: Row) -> Layout | None:
    """Return the layout by the row's keys; None if it has no known one."""
    return next((name for name, (matches, _convert) in LAYOUTS.items() if matches(row)), None)


def to_messages(row: Row, layout: Layout) -> list[ChatMessage]:
    """Return the row's messages: an optional system message, then user and assistant in turn.

    Raises:
        RowError: something required is missing, empty, not text or out of order.
    """
    system = _optional_text(row, "system")
    messages = [ChatMessage(role="system", content=system)] if system.strip() else []
    _matches, convert = LAYOUTS[layout]
    messages += convert(row)
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError(_("a system message that is not the first"))
    turns = [role for role in roles if role != "system"]
    if not turns:
        raise RowError(_("no messages"))
    if turns[-1] != "assistant":
        raise RowError(_("the last message is not the assistant's"))
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(turns)):
        raise RowError(_("user and assistant do not alternate"))
    for message in messages:
        if not message["content"].strip():
            raise RowError(NO_ANSWER if message["role"] == "assistant" else _("no question"))
        if _DAMAGE.search(message["content"]):
            raise RowError(_("damaged text (U+FFFD, or half of a surrogate pair)"))
    return messages


def _list(row: Row, key: str) -> list[Any]:
    if key not in row:
        raise RowError(_("field `{key}` missing"), key=key)
    if not isinstance(items := row[key], list):
        raise RowError(_("`{key}` is not a list"), key=key)
    return items


def _text(row: Row, key: str) -> str:
    text = row.get(key)
    if isinstance(text, str):
        return text
    if key not in row:
        raise RowError(_("field `{key}` missing"), key=key)
    raise RowError(_("`{key}` is null") if text is None else _("`{key}` is not text"), key=key)


def _optional_text(row: Row, key: str) -> str:
    return "" if row.get(key) is None else _text(row, key)
