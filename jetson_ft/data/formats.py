"""The layouts a row may have, and the one that everything else works with: messages.

`alpaca` stands for every pair of a question and an answer column (instruction/output,
prompt/response, prompt/completion, question/answer); `sharegpt` for `conversations` of
{from, value}; `messages` for OpenAI's {role, content}. A row that can't be used is a
`RowError` whose reason names no content, so that equal faults can be counted.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypedDict, cast

Layout = Literal["alpaca", "sharegpt", "messages"]


class Message(TypedDict):
    """One turn of a conversation; the role is `system`, `user` or `assistant`."""

    role: str
    content: str


class RowError(ValueError):
    """Why a row can't be used."""


NO_ANSWER = "no answer"

_PAIRS = (
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
)
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_DAMAGE = re.compile("[\ud800-\udfff\ufffd]")


def detect(value: dict[str, Any]) -> Layout | None:
    """The layout by the row's keys."""
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        return "sharegpt"
    if any(question in value and answer in value for question, answer in _PAIRS):
        return "alpaca"
    return None


def normalise(value: dict[str, Any], layout: Layout) -> list[Message]:
    """The row as messages: an optional system message, then user and assistant in turn.

    Raises:
        RowError: something required is missing, empty, not text or out of order.
    """
    system = _optional_text(value, "system")
    messages = [_message("system", system)] if system.strip() else []
    if layout == "alpaca":
        messages += _pairs(value)
    else:
        messages += _turns(value, "conversations" if layout == "sharegpt" else "messages")
    _check(messages)
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _pairs(value: dict[str, Any]) -> list[Message]:
    """The history's questions and answers, then the row's own."""
    # The pair with both columns present; else the first with one, to name what is missing.
    question, answer = max(_PAIRS, key=lambda pair: (pair[0] in value) + (pair[1] in value))
    texts: list[str] = []
    for earlier in _list(value, "history") if value.get("history") is not None else []:
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise RowError("`history` is not a list of pairs")
        if not all(isinstance(text, str) for text in earlier):
            raise RowError("`history` holds what is not text")
        texts += earlier
    parts = [_text(value, question), _optional_text(value, "input")]
    texts += ["\n".join(part for part in parts if part), _text(value, answer)]
    return [_message("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]


def _turns(value: dict[str, Any], key: str) -> list[Message]:
    """The turns of a conversation; both ways to name role and content are understood."""
    messages = []
    for turn in _list(value, key):
        if not isinstance(turn, dict):
            raise RowError(f"`{key}` holds what is not an object")
        said = _text(turn, "from" if "from" in turn else "role")
        if said not in _ROLES:
            raise RowError(f"a role other than {', '.join(_ROLES)}")
        content = _joined(turn, "value" if "value" in turn else "content")
        if _ROLES[said] != "system" or content.strip():
            messages.append(_message(_ROLES[said], content))
    return messages


def _joined(turn: dict[str, Any], key: str) -> str:
    """Text, or OpenAI's list of parts put together."""
    if not isinstance(turn.get(key), list):
        return _text(turn, key)
    parts = turn[key]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise RowError(f"`{key}` has a part that is not text")
    return "".join(_text(part, "text") for part in parts)


def _list(value: dict[str, Any], key: str) -> list[Any]:
    if key not in value:
        raise RowError(f"field `{key}` missing")
    if not isinstance(value[key], list):
        raise RowError(f"`{key}` is not a list")
    return cast(list[Any], value[key])


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if isinstance(text, str):
        return text
    if key not in value:
        raise RowError(f"field `{key}` missing")
    raise RowError(f"`{key}` is null" if text is None else f"`{key}` is not text")


def _optional_text(value: dict[str, Any], key: str) -> str:
    return "" if value.get(key) is None else _text(value, key)


def _check(messages: list[Message]) -> None:
    """Order of the roles, and that every message says something."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError("a system message that is not the first")
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if not roles:
        raise RowError("no messages")
    if roles[-1] != "assistant":
        raise RowError("the last message is not the assistant's")
    if any(role != ("user", "assistant")[at % 2] for at, role in enumerate(roles)):
        raise RowError("user and assistant do not alternate")
    for message in messages:
        if not message["content"].strip():
            raise RowError(NO_ANSWER if message["role"] == "assistant" else "no question")
        if _DAMAGE.search(message["content"]):
            raise RowError("damaged text (U+FFFD, or half of a surrogate pair)")
