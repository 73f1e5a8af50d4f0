"""Messages, and their conversion from the forms that a row has them in.

Which columns of a row have them is not here (see `layouts`). A row that can't be used raises a
`RowError` whose reason names no content, so that equal ones are counted.
"""

from __future__ import annotations

import json
from typing import Any, TypedDict

from jetson_ft.errors import Message, _
from jetson_ft.files import printable

Row = dict[str, Any]


class _RequiredFields(TypedDict):
    role: str
    content: str


class ChatMessage(_RequiredFields, total=False):
    """One message of a conversation; the role is `system`, `user`, `assistant` or `tool`.

    A document of plain text is one message alone, of the role `TEXT`.

    Only messages of the assistant have the other fields: `train` (absent: True) is False for an
    answer that is not trained on; `tool_calls` (absent or "": none) is the JSON text of OpenAI's
    list: `[{"type": "function", "function": {"name": "…", "arguments": {…}}}]`.
    """

    train: bool
    tool_calls: str


class RowError(ValueError):
    """A row can't be used; `reason` says why, from a template and its values."""

    def __init__(self, template: str, **values: Any) -> None:
        self.reason = Message(template, values)
        super().__init__(self.reason)


SEVERAL_ANSWERS = _("`{key}` is a list of answers, not one answer")

TEXT = "text"
NO_CONTENT: tuple[Any, ...] = (None, "", [], {})
_CALL = "call"  # a role in ShareGPT: the assistant's call of a tool
_ROLES = {
    name: role
    for role, names in {
        "system": "system developer 系统",
        "user": "user human prompter 用户 人类 提问者 问",
        "assistant": "assistant gpt chatgpt bot chatbot model ai moss 助手 助理 机器人 模型 答",
        "tool": "tool observation function tool_response function_response 工具",
        _CALL: "function_call tool_call",
    }.items()
    for name in names.split()
}
_ROLE_KEYS, _CONTENT_KEYS = ("from", "role"), ("value", "content", "text")
_TRAIN_KEYS = ("weight", "loss", "train", "training")  # of OpenAI, SWIFT and Axolotl
_CALL_KEYS = ("tool_calls", "function_call")
_TURN_KEYS = {*_ROLE_KEYS, *_CONTENT_KEYS, *_TRAIN_KEYS, *_CALL_KEYS}
_SHOWN_ROLE = 20  # characters

# Names of a question and its answer, most specific pairs first; "input" is often an addition to
# the question of another column.
_ANSWERS = (
    "output", "response", "completion", "answer", "target", "答案", "回答",
    "outputs", "responses", "completions", "answers",
)  # fmt: skip
PAIRS: tuple[tuple[str, str], ...] = (
    ("instruction", "output"), ("prompt", "response"), ("prompt", "completion"),
    ("question", "answer"), ("query", "response"), ("问题", "答案"),
    *((question, answer) for question in ("instruction", "prompt", "question", "query", "问题",
                                          "指令", "input") for answer in _ANSWERS),
)  # fmt: skip


def role_of(name: str) -> str:
    """Return the role that a name stands for; "" if it is unknown."""
    return _ROLES.get(name.strip().casefold(), "")


def text_of(row: Row, key: str) -> str:
    """Return the text of a required field."""
    text = row.get(key)
    if isinstance(text, str):
        return text
    if key not in row:
        raise RowError(_("field `{key}` missing"), key=key)
    if isinstance(text, list) and key in _ANSWERS:
        raise RowError(SEVERAL_ANSWERS, key=key)
    raise RowError(_("`{key}` is null") if text is None else _("`{key}` is not text"), key=key)


def list_of(row: Row, key: str) -> list[Any]:
    """Return a list, which in a cell of text is JSON."""
    if key not in row:
        raise RowError(_("field `{key}` missing"), key=key)
    items = row[key]
    if isinstance(items, str) and items.lstrip().startswith("["):
        items = _parsed(items, _("`{key}` is not valid JSON"), key)
    if isinstance(items, str) and not items.strip():
        return []
    if not isinstance(items, list):
        raise RowError(_("`{key}` is not a list"), key=key)
    return items


def _parsed(text: str, template: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(template, key=key) from None


def read_turns(turns: list[Any], key: str, unread: set[str]) -> list[ChatMessage]:
    """Convert turns: {role, content}, {from, value}, or a question with its answer each.

    Args:
        key: the column's name, for reasons.
        unread: gets the names of the turns' fields that have content and are not read.
    """
    messages: list[ChatMessage] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError(_("`{key}` has an item that is not an object"), key=key)
        pair = _pair_of(turn)
        if pair:
            contents = {"user": text_of(turn, pair[0]), "assistant": text_of(turn, pair[1])}
            messages += [ChatMessage(role=role, content=text) for role, text in contents.items()]
            names = {*pair, *_TRAIN_KEYS}
            if not _is_trained(turn):
                messages[-1]["train"] = False
        else:
            names = _TURN_KEYS
            _add_turn(messages, turn)
        unread |= {f"{key}[].{name}" for name in set(turn) - names if turn[name] not in NO_CONTENT}
    return messages


def _pair_of(turn: Row) -> tuple[str, str] | None:
    """Return the fields of a question and its answer; None for a turn with a role."""
    if any(key in turn for key in _ROLE_KEYS):
        return None
    by_role = {role_of(name): name for name in turn}
    if "user" in by_role and "assistant" in by_role:
        return by_role["user"], by_role["assistant"]
    return next((pair for pair in PAIRS if pair[0] in turn and pair[1] in turn), None)


def _add_turn(messages: list[ChatMessage], turn: Row) -> None:
    """Append a turn's message; a call belongs to the assistant's message before it."""
    name = text_of(turn, first_key(turn, _ROLE_KEYS, "role"))
    content_key = first_key(turn, _CONTENT_KEYS, "content")
    role = role_of(name)
    if not role:
        shown = printable(name.strip()[:_SHOWN_ROLE])
        raise RowError(_("unknown role `{role}`"), role=shown)
    calls: list[Any] = []
    calls_key = content_key
    if role == _CALL:
        role, content = "assistant", ""
        calls = _read_calls(turn, content_key)
    else:
        if role == "assistant":
            for key in _CALL_KEYS:
                if turn.get(key):
                    calls += _read_calls(turn, key)
                    calls_key = key
        content = "" if calls and turn.get(content_key) is None else _content(turn, content_key)
        if role == "system" and not content.strip():
            return
    message = ChatMessage(role=role, content=content)
    if role == "assistant" and not _is_trained(turn):
        message["train"] = False
    if calls:
        message["tool_calls"] = _as_json(calls, calls_key)
    previous = messages[-1] if messages else None
    if calls and not content and previous and previous["role"] == "assistant":
        if previous.get("train") != message.get("train"):
            raise RowError(_("a tool call and the text or call before it are marked differently"))
        earlier = json.loads(previous.get("tool_calls") or "[]")
        previous["tool_calls"] = _as_json(earlier + calls, calls_key)
    else:
        messages.append(message)


def first_key(turn: Row, names: tuple[str, ...], default: str) -> str:
    """Return the first name that has a value, else the first that there is, else the default."""
    present = [name for name in names if name in turn]
    filled = [name for name in present if turn[name] is not None]
    return (filled or present or [default])[0]


def _content(turn: Row, key: str) -> str:
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text_of(turn, key)
    # OpenAI's list of parts
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise RowError(_("`{key}` has a part that is not text"), key=key)
    return "".join(text_of(part, "text") for part in parts)


def _is_trained(turn: Row) -> bool:
    for key in _TRAIN_KEYS:
        if (value := turn.get(key)) is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(_("`{key}` is neither 1 nor 0 (true nor false)"), key=key)
        if not value:
            return False
    return True


def _read_calls(turn: Row, key: str) -> list[Any]:
    """Return OpenAI's list of calls from a list, from one call, or from JSON text of either."""
    template = _("`{key}` is not a tool call (JSON with `name` and `arguments`)")
    calls = turn.get(key)
    if isinstance(calls, str):
        calls = _parsed(calls, template, key)
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(template, key=key)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parsed(arguments, template, key)
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(template, key=key)
        named = {"name": function["name"], "arguments": arguments}
        result.append({"type": "function", "function": named})
    return result


def read_tools(row: Row, key: str) -> str:
    """Return the JSON text of a row's tools in OpenAI's form; "" if there are none."""
    template = _("`{key}` is not a list of tools (JSON, each with a `name`)")
    tools = row[key]
    if isinstance(tools, str):
        tools = _parsed(tools, template, key) if tools.strip() else []
    result = []
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(template, key=key)
        result.append({"type": "function", "function": function})
    return _as_json(result, key) if result else ""


def _as_json(value: Any, key: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise RowError(_("`{key}` is nested too deeply"), key=key) from None
    except TypeError as error:  # of Parquet
        raise RowError(
            _("`{key}` has a value that JSON has not, such as a date or bytes ({reason})"),
            key=key,
            reason=str(error),
        ) from None
