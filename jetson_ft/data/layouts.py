"""The layouts that a row can have, and their conversion to a conversation.

`LAYOUTS` is the one table; its names are those of `data.format` (`recipe.Layout`). Names of columns
are compared without regard to case and surrounding spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jetson_ft.data.formats import (
    NO_CONTENT,
    PAIRS,
    SEVERAL_ANSWERS,
    TEXT,
    ChatMessage,
    Row,
    RowError,
    list_of,
    read_tools,
    read_turns,
    role_of,
    text_of,
)
from jetson_ft.errors import _
from jetson_ft.recipe import Layout

NO_ANSWER = _("no answer")
_NO_QUESTION = _("no question")
PREFERENCE = _("a preference pair: `{key}` has the unwanted answer")
CHAT_MARKUP = _("a conversation written out as text, beginning with `{mark}`")

NO_COLUMNS: Mapping[str, str] = {}

_MAX_CATEGORY = 80  # characters
_SYSTEM = ("system", "system_prompt", "system_message", "meta_instruction")
_TOOLS = ("tools", "functions")
_LABELS = ("label", "kto_tag")  # whether the answer is a wanted one
_REJECTED = re.compile(r"(\w+_)?rejected(_(response|answer|output|text|messages?|conversations?))?")
_PLACEHOLDERS = {"nan", "none", "null", "<noinput>"}  # for no content, in optional columns
_BLANK = re.compile(r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*")  # white space, and zero width
_DAMAGE = re.compile("[\ud800-\udfff\ufffd]")
_DAMAGED = _("damaged text (U+FFFD, or half of a surrogate pair)")
# BELLE's dialogues in one text, and MOSS's marks around a text.
_SPEAKER = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant)[ \t]*[:：]")
_MOSS_MARKS = re.compile(r"\s*<\|[^|>]{1,30}\|>:(.*?)(?:<eo[a-z]>)?\s*", re.DOTALL)
# How chats begin that a chat template has rendered: ChatML, Llama 3 and 2, Gemma, Phi-3, Mistral.
_CHAT_MARKUP = re.compile(
    r"(?:\s|<s>|<bos>|<\|begin_of_text\|>)*"
    r"(<\|im_start\|>|<\|start_header_id\|>|\[INST\]|<start_of_turn>|"
    r"<\|(?:system|user|assistant)\|>|<[|｜](?:User|Assistant)[|｜]>)"
)
# Columns about a text, by which a row with only a column `text` is plain text all the same.
_ABOUT_TEXT = {
    "id", "_id", "uid", "doc_id", "title", "url", "source", "src", "meta", "metadata", "timestamp",
    "date", "time", "created", "added", "lang", "language", "language_score", "token_count", "dump",
    "file_path", "path", "author", "license",
}  # fmt: skip
_FOLLOWING = {  # roles after a role; "call" is the assistant's with tool calls
    "": {"user"},  # the start
    "user": {"assistant", "call"},
    "assistant": {"user"},
    "call": {"tool"},
    "tool": {"tool", "assistant", "call"},
}


class Conversation(NamedTuple):
    """A row's content.

    Args:
        tools: JSON text of the list of tools in OpenAI's form; "" if there are none.
        unread: names of the columns, and of the messages' fields, that have content but no use.
    """

    messages: list[ChatMessage]
    tools: str
    unread: list[str]


class _Columns:
    """A row's columns by their purpose; notes which ones are read.

    Args:
        chosen: names of columns by purpose, as `data.columns` has them.
    """

    def __init__(self, row: Row, chosen: Mapping[str, str]) -> None:
        self.row, self.chosen = row, chosen
        self.names = {name.strip().casefold(): name for name in row}
        self.unread: set[str] = set()
        self._read: set[str] = set()

    def find(self, purpose: str, *usual: str) -> str | None:
        """Return the name of the column for a purpose: the chosen one, else a usual one.

        Among the usual ones it is the first that has content, else the first.
        """
        if purpose in self.chosen:
            return self.chosen[purpose]
        names = [self.names[name] for name in usual if name in self.names]
        filled = [name for name in names if self.row[name] not in NO_CONTENT]
        return next(iter(filled or names), None)

    def read(self, name: str) -> str:
        """Note that a column is read; return its name."""
        self._read.add(name)
        return name

    def optional(self, purpose: str, *usual: str) -> str:
        """Return the text of an optional column; "" where there is none."""
        name = self.find(purpose, *usual)
        if name is None or self.is_empty(name):
            return ""
        return text_of(self.row, self.read(name))

    def is_empty(self, name: str) -> bool:
        """Return whether a column has no content, or a placeholder for none."""
        value = self.row.get(name)
        if value in NO_CONTENT or value != value:  # NaN
            return True
        if isinstance(value, str) and value.strip().casefold() in _PLACEHOLDERS:
            self.unread.add(f"{name}: {value.strip()}")
            self.read(name)
            return True
        return False

    def all_unread(self) -> list[str]:
        """Return the names of what has content and was not read."""
        left = {name for name in self.row if name not in self._read}
        return sorted({name for name in left if self.row[name] not in NO_CONTENT} | self.unread)


_Matches = Callable[[_Columns], bool]
_Convert = Callable[[_Columns], list[ChatMessage]]


def _list_layout(*usual: str) -> tuple[_Matches, _Convert]:
    """Return the functions of a layout whose messages are in one column."""

    def matches(columns: _Columns) -> bool:
        if {"question", "messages"} & columns.chosen.keys():
            return "messages" in columns.chosen
        value = columns.row.get(columns.find("messages", *usual) or "")
        is_json = isinstance(value, str) and value.lstrip().startswith("[")
        return bool(value) and (is_json or isinstance(value, list | dict))

    def convert(columns: _Columns) -> list[ChatMessage]:
        key = columns.read(columns.find("messages", *usual) or usual[0])
        if isinstance(columns.row.get(key), dict):
            turns = _moss_turns(columns.row[key], key, columns.unread)
        else:
            turns = list_of(columns.row, key)
        messages = read_turns(turns, key, columns.unread)
        if "answer" in columns.chosen:
            messages += _side(columns, columns.chosen["answer"], "assistant")
        return messages

    return matches, convert


def _moss_turns(chat: dict[str, Any], key: str, unread: set[str]) -> list[dict[str, str]]:
    """Return the question and the answer of each turn of MOSS's `chat`, without its marks."""

    def numbers(name: str) -> list[tuple[int, str]]:
        """Return what orders names by their numbers, also those too long for `int`."""
        digits = [text.lstrip("0") for text in re.findall("[0-9]+", name)]
        return [(len(text), text) for text in digits]

    turns = []
    for name in sorted(chat, key=numbers):
        if not isinstance(chat[name], dict):
            raise RowError(_("`{key}` has an item that is not an object"), key=key)
        turn = {}
        for field in chat[name]:
            text = text_of(chat[name], field)
            if marked := _MOSS_MARKS.fullmatch(text):
                text = marked[1].strip()
            if role_of(field):
                turn[field] = text
            elif text not in ("", "None"):
                if field == "Commands":
                    raise RowError(_("a command to one of MOSS's tools, which are not known"))
                unread.add(f"{key}[].{field}")
        turns.append(turn)
    return turns


def _pair_of(columns: _Columns) -> tuple[str | None, str | None, tuple[str, str]]:
    """Return the question's and the answer's column (None: missing), and their usual names."""
    given = {key for key, name in columns.names.items() if columns.row[name] is not None}
    chosen = frozenset(columns.chosen)
    usual = _usual_pair(frozenset(given), frozenset(columns.names), chosen)
    return columns.find("question", usual[0]), columns.find("answer", usual[1]), usual


@lru_cache(maxsize=256)
def _usual_pair(
    given: frozenset[str], names: frozenset[str], chosen: frozenset[str]
) -> tuple[str, str]:
    """Return the pair with both columns; else the first with one, so that errors name the other.

    Args:
        given: names of the columns that are not null.
        names: names of all columns.
        chosen: purposes that have a chosen column.
    """

    def columns_of(pair: tuple[str, str], names: frozenset[str]) -> int:
        question, answer = pair
        return ("question" in chosen or question in names) + ("answer" in chosen or answer in names)

    return max(PAIRS, key=lambda pair: (columns_of(pair, given), columns_of(pair, names)))


def _has_pair(columns: _Columns) -> bool:
    question, answer, _usual = _pair_of(columns)
    return question is not None and answer is not None


def _pair_to_messages(columns: _Columns) -> list[ChatMessage]:
    """Convert question and answer columns: the turns of `history`, then the row's own pair."""
    question, answer, usual = _pair_of(columns)
    messages = _history(columns)
    own = _side(columns, question or usual[0], "user")
    context, more = (
        "" if columns.find(name, name) in (question, answer) else columns.optional(name, name)
        for name in ("context", "input")
    )
    if not own:  # a list of nothing but an empty system message
        raise RowError(_NO_QUESTION)
    parts = [context, own[-1]["content"], more]
    own[-1]["content"] = "\n".join(part for part in parts if part.strip())
    return [*messages, *own, *_side(columns, answer or usual[1], "assistant")]


def _side(columns: _Columns, name: str, role: str) -> list[ChatMessage]:
    """Return the messages of a question or answer column: a text, a message, or several."""
    value = columns.row.get(name)
    items = [value] if isinstance(value, dict) else value
    columns.read(name)
    if not isinstance(items, list):
        text = text_of(columns.row, name)
        return _split_dialogue(text) if role == "user" else [ChatMessage(role=role, content=text)]
    if all(isinstance(item, dict) and {"role", "from"} & set(item) for item in items) and items:
        return read_turns(items, name, columns.unread)
    if role == "assistant" and isinstance(value, list):
        raise RowError(SEVERAL_ANSWERS, key=name)
    raise RowError(_("`{key}` is not text"), key=name)


def _split_dialogue(text: str) -> list[ChatMessage]:
    """Return the turns of a text `Human: … Assistant: … Human: … Assistant:`.

    Any other text is one question.
    """
    start, *pieces = _SPEAKER.split(text)
    roles, contents = [role_of(name) for name in pieces[::2]], pieces[1::2]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2)
    if start.strip() or not roles or not alternate or contents[-1].strip():
        return [ChatMessage(role="user", content=text)]
    return [
        ChatMessage(role=role, content=content.strip())
        for role, content in zip(roles[:-1], contents, strict=False)
    ]


def _history(columns: _Columns) -> list[ChatMessage]:
    """Return the messages of `history`: pairs, objects, or questions and answers in turn."""
    key = columns.find("history", "history")
    if key is None or columns.is_empty(key):
        return []
    columns.read(key)
    items = list_of(columns.row, key)
    if items and all(isinstance(item, str) for item in items):
        if len(items) % 2:
            raise RowError(_("`{key}` is not a list of pairs"), key=key)
        items = list(zip(items[::2], items[1::2], strict=True))
    messages: list[ChatMessage] = []
    for item in items:
        if not item or (isinstance(item, list | tuple) and not any(item)):
            continue
        if isinstance(item, dict):
            messages += read_turns([item], key, columns.unread)
            continue
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise RowError(_("`{key}` is not a list of pairs"), key=key)
        if not all(isinstance(text, str) for text in item):
            raise RowError(_("`{key}` has an item that is not text"), key=key)
        messages += read_turns([{"user": item[0], "assistant": item[1]}], key, columns.unread)
    return messages


def _is_plain_text(columns: _Columns) -> bool:
    """Return whether the row has a chosen column of text, or `text` beside columns about it."""
    if "text" in columns.chosen or {"question", "answer", "messages"} & columns.chosen.keys():
        return columns.chosen.get("text") in columns.row
    given = {name for name, column in columns.names.items() if not columns.is_empty(column)}
    return isinstance(columns.row.get(columns.names.get("text", "")), str) and (
        given <= {"text", *_ABOUT_TEXT}
    )


def _text_to_messages(columns: _Columns) -> list[ChatMessage]:
    """Return a document as one message; refuse a conversation that is written out as text."""
    text = text_of(columns.row, columns.read(columns.find("text", "text", "content") or "text"))
    if _BLANK.fullmatch(text):
        raise RowError(_("no text"))
    if mark := _CHAT_MARKUP.match(text):
        raise RowError(CHAT_MARKUP, mark=mark[1])
    return [ChatMessage(role=TEXT, content=text)]


# By layout, in the order of detection: whether a row has it; the row's messages without those of a
# `system` column.
LAYOUTS: dict[Layout, tuple[_Matches, _Convert]] = {
    # Plain text without question and answer: a chosen column, or `text`
    "text": (_is_plain_text, _text_to_messages),
    # OpenAI: {role, content} each
    "messages": _list_layout("messages"),
    # ShareGPT: {from, value} each; MOSS: `chat`
    "sharegpt": _list_layout("conversations", "conversation", "dialog", "dialogue", "chat"),
    # Alpaca: a question and an answer column, optional `context`, `input`, `history`
    "alpaca": (_has_pair, _pair_to_messages),
}
_EMPTY_LISTS: dict[str, Layout] = {"messages": "messages", "conversations": "sharegpt"}


def detect_layout(row: Row, chosen: Mapping[str, str] = NO_COLUMNS) -> Layout | None:
    """Return the layout by the row's columns; None if it has no known one.

    Args:
        chosen: names of columns by purpose, as `data.columns` has them.
    """
    columns = _Columns(row, chosen)
    for name, (matches, _convert) in LAYOUTS.items():
        if matches(columns):
            return name
    return next((name for key, name in _EMPTY_LISTS.items() if key in columns.names), None)


def has_layout(row: Row, layout: Layout, chosen: Mapping[str, str] = NO_COLUMNS) -> bool:
    """Return whether the row has the columns of a layout, perhaps beside those of another.

    Args:
        chosen: names of columns by purpose, as `data.columns` has them.
    """
    columns = _Columns(row, chosen)
    if layout == "text":
        return isinstance(row.get(columns.find("text", "text") or ""), str)
    return LAYOUTS[layout][0](columns)


def rejected_column(row: Row) -> str:
    """Return the name of the column with the unwanted answer of a preference pair; "" if none."""
    return next(
        (
            name
            for name, value in row.items()
            if isinstance(value, str | list | dict)
            and value
            and _REJECTED.fullmatch(name.strip().casefold())
        ),
        "",
    )


def to_conversation(
    row: Row, layout: Layout, chosen: Mapping[str, str] = NO_COLUMNS
) -> Conversation:
    """Return the row's conversation: an optional system message, then user and assistant in turn.

    Of the layout `text` it is one message of the role `TEXT`.
    After tool calls of the assistant, the messages of the tools come before its answer.

    Raises:
        RowError: something required is missing, empty, not text or out of order.
    """
    columns = _Columns(row, chosen)
    if not {"answer", "messages", "text"} & chosen.keys() and (key := rejected_column(row)):
        raise RowError(PREFERENCE, key=key)
    if layout == "text":
        document = LAYOUTS[layout][1](columns)
        if _DAMAGE.search(document[0]["content"]):
            raise RowError(_DAMAGED)
        return Conversation(document, "", columns.all_unread())
    for name, value in row.items():
        is_false = value is False or (
            isinstance(value, str) and value.strip().casefold() == "false"
        )
        if is_false and name.strip().casefold() in _LABELS:
            raise RowError(_("an unwanted answer: `{key}` is false"), key=name)
    system = columns.optional("system", *_SYSTEM)
    messages = LAYOUTS[layout][1](columns)
    first = ChatMessage(role="system", content=system)
    if system.strip() and messages[:1] != [first]:
        messages.insert(0, first)
    tools = ""
    tools_key = columns.find("tools", *_TOOLS)
    if tools_key is not None and not columns.is_empty(tools_key):
        tools = read_tools(row, columns.read(tools_key))
    _check_order(messages)
    for message in messages:
        role, text, calls = message["role"], message["content"], message.get("tool_calls", "")
        is_nan = role == "assistant" and text == "nan"  # an empty cell that went through pandas
        if (_BLANK.fullmatch(text) or is_nan) and not calls and role != "tool":
            raise RowError(NO_ANSWER if role == "assistant" else _NO_QUESTION)
        if _DAMAGE.search(text + calls):
            raise RowError(_DAMAGED)
    if _DAMAGE.search(tools):
        raise RowError(_DAMAGED)
    if all(message.get("train") is False for message in messages if message["role"] == "assistant"):
        raise RowError(_("every answer is marked as not to be trained on"))
    return Conversation(messages, tools, columns.all_unread())


def category_of(row: Row, chosen: Mapping[str, str] = NO_COLUMNS) -> str:
    """Return the text of the column `category`, by which an evaluation groups its rows.

    It is "" where there is none, or it is no short text, or the column has another purpose.
    """
    name = _Columns(row, chosen).find("", "category")
    value = row.get(name) if name and name not in chosen.values() else None
    if not isinstance(value, str) or len(value) > _MAX_CATEGORY or _DAMAGE.search(value):
        return ""
    return value.strip()


def _check_order(messages: list[ChatMessage]) -> None:
    roles = ["call" if message.get("tool_calls") else message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError(_("a system message that is not the first"))
    turns = [role for role in roles if role != "system"]
    if not turns:
        raise RowError(_("no messages"))
    if turns[-1] not in ("assistant", "call"):
        raise RowError(_("the last message is not the assistant's"))
    for previous, role in zip(["", *turns], turns, strict=False):
        if role not in _FOLLOWING[previous]:
            template = _("user and assistant do not alternate: {role} after {previous}")
            if not previous:
                template = _("user and assistant do not alternate: {role} first")
            raise RowError(template, role=role, previous=previous)
