"""JSON Lines, and JSON: an array, an object with a list of rows, or objects in succession.

The JSON reader is written here because no library streams it with line numbers in bounded memory
(docs/decisions/0010-own-json-reader.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jetson_ft.data import encodings
from jetson_ft.data.formats import RowError
from jetson_ft.errors import _
from jetson_ft.files import printable

LocatedValue = tuple[int | None, Any]  # line (None in binary files), and a value or a `RowError`

UNREADABLE_REST = _("{reason}; nothing from here on can be read")  # of the file's last row
_COMMENT = _("not valid JSON (a comment, which JSON does not have)")
# Lists inside a row, not lists of rows.
_ROW_LISTS = {
    "messages", "conversations", "conversation", "dialog", "dialogue", "chat", "history", "tools",
    "functions", "chosen", "rejected", "prompt", "completion", "completions",
}  # fmt: skip
_SPLIT_KEYS = {"columns", "index", "data"}  # of pandas' `orient="split"`
_OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}  # not read, unlike `train`


def parse_json(text: str) -> Any:
    """Return the JSON value of the text, or a `RowError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _invalid_json(error)


def _invalid_json(error: Exception) -> RowError:
    """Return the error for what Python's JSON decoder raised."""
    if isinstance(error, RecursionError):
        return RowError(_("not valid JSON (nested too deeply)"))
    if isinstance(error, json.JSONDecodeError):
        return RowError(_("not valid JSON ({reason})"), reason=error.msg)
    return RowError(_("not valid JSON (a number too long)"))


def read_jsonl(path: Path, encoding: str) -> Iterator[LocatedValue]:
    """Yield the value of each line that is not blank; a malformed one does not end the reading."""
    for number, line in enumerate(encodings.read_lines(path, encoding), 1):
        if line.lstrip().startswith(("#", "//")):
            yield number, RowError(_COMMENT)
        elif not line.isspace():
            yield number, parse_json(line)


class _JsonStream:
    """A window of the text that moves on as JSON values are read from its start."""

    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    opening = re.compile(r"\[[ \t\r\n]*[^ \t\r\n]")

    def __init__(self, blocks: Iterator[str]) -> None:
        self.line = 1
        self._blocks, self._text, self._at, self._ended = blocks, "", 0, False

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            space = self.space.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._grow()

    def take(self, expected: str) -> str:
        """Consume and return the next character, which must be one of `expected`."""
        character = self.peek()
        if not character:
            raise RowError(_("cut off"))
        if character not in expected:
            choices = "` or `".join(expected)
            raise RowError(_("not valid JSON (`{choices}` is missing)"), choices=choices)
        self._advance(self._at + 1)
        return character

    def value(self) -> Any:
        """Consume and return the next JSON value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # The window's end can cut a literal or an escape (of 16 characters) in two.
                end = len(self._text) - (0 if self._ended else 16)
                is_cut = isinstance(error, json.JSONDecodeError) and (
                    error.pos >= end or error.msg.startswith("Unterminated")
                )
                if not is_cut:
                    raise _invalid_json(error) from None
                if self._ended:
                    raise RowError(_("cut off")) from None
            else:
                # A number at the very end may have more digits to come.
                if self._ended or end < len(self._text) - 3:
                    self._advance(end)
                    return value
            self._grow()

    def at_objects(self) -> bool:
        """Return whether a list that begins with an object comes next."""
        if self.peek() != "[":
            return False
        while not (opening := self.opening.match(self._text, self._at)) and not self._ended:
            self._grow()
        return opening is not None and opening.group().endswith("{")

    def next_list(self) -> str:
        """Skip to the next list of objects from before a key.

        Returns:
            The list's key, or "" at the end of the object.
        """
        separator = ","
        while separator == ",":
            key = self.value()
            self.take(":")
            if not isinstance(key, str):
                raise RowError(_("not valid JSON (a key is not text)"))
            if key not in _ROW_LISTS and self.at_objects():
                return printable(key)
            self.value()
            separator = self.take(",}")
        return ""

    def items(self) -> Iterator[LocatedValue]:
        """Consume a list and yield its values, each with the line it starts on."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        separator = ","
        while separator == ",":
            self.peek()
            yield self.line, self.value()
            separator = self.take(",]")

    def skip_list(self) -> tuple[int, str]:
        """Skip a list; return its length, and the key of the next one as `next_list` does."""
        length = sum(1 for _item in self.items())
        return length, self.next_list() if self.take(",}") == "," else ""

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _grow(self) -> None:
        """Drop what was read and read on; doubling keeps retries linear in a row's length."""
        blocks = [self._text[self._at :]]
        length = unread = len(blocks[0])
        if length > encodings.MAX_ROW_CHARACTERS:
            limit = encodings.MAX_ROW_CHARACTERS >> 20
            raise RowError(_("longer than {limit} Mi characters"), limit=limit)
        while length <= 2 * unread and not self._ended:
            blocks.append(next(self._blocks, ""))
            length += len(blocks[-1])
            self._ended = not blocks[-1]
        self._text, self._at = "".join(blocks), 0


def list_key(path: Path, encoding: str) -> str:
    """Return the key of the list of rows in a JSON object; "" if the file is no such object.

    That is the first list; among the parts of a split data set it is `train`.
    """
    stream = _JsonStream(encodings.decode_file(path, encoding))
    first = key = ""
    try:
        stream.take("{")
        first = key = stream.next_list()
        while key in _OTHER_SPLITS:
            _length, key = stream.skip_list()
    except RowError:
        pass
    return key if key == "train" else first


def read_json(
    path: Path, encoding: str, key: str, unread: dict[str, int]
) -> Iterator[LocatedValue]:
    """Yield the rows of an array, of the list `key` in an object, or of objects in succession.

    Where the JSON is not valid, a `RowError` is the last row.

    Args:
        unread: gets the number of rows in the other parts of a split data set, by key.
    """
    stream = _JsonStream(encodings.decode_file(path, encoding))
    try:
        if stream.peek() in ("#", "/"):
            raise RowError(_COMMENT)
        if key:
            stream.take("{")
            other = stream.next_list()
            while other != key:
                unread[other], other = stream.skip_list()
        elif stream.peek() == "{":
            while stream.peek():
                yield stream.line, stream.value()
            return
        yield from stream.items()
        other = stream.next_list() if key and stream.take(",}") == "," else ""
        while other:
            if key != "train" or other not in _OTHER_SPLITS:
                raise RowError(
                    _("a second list of rows, `{second}`, besides `{key}`"), second=other, key=key
                )
            unread[other], other = stream.skip_list()
        if stream.peek():
            raise RowError(_("text after the end of the JSON"))
    except RowError as error:
        yield stream.line, RowError(UNREADABLE_REST, reason=error.reason)


def rows_of_frame(value: Any) -> list[Any] | None:
    """Return the rows of an object that has a whole table, as pandas' `to_json` writes it.

    The table is {column: {number: value}}, {number: row}, {column: [values]}, or its columns and
    its data apart (`orient="split"`). None: the object is something else, such as a row.
    """
    if not isinstance(value, dict) or not value or set(value) <= _ROW_LISTS:
        return None
    names, table = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(table, list) and set(value) <= _SPLIT_KEYS:
        are_names = all(isinstance(name, str) for name in names) and len({*names}) == len(names)
        fits = are_names and all(isinstance(row, list) and len(row) == len(names) for row in table)
        return [dict(zip(names, row, strict=True)) for row in table] if fits else None
    columns = list(value.values())
    if all(isinstance(column, dict) for column in columns):
        if all(number.isdecimal() for number in value):
            return columns
        numbers = columns[0].keys()
        if numbers and all(number.isdecimal() for column in columns for number in column):
            if any(column.keys() != numbers for column in columns):
                return None
            return [{name: column[number] for name, column in value.items()} for number in numbers]
        return None
    is_list = all(
        isinstance(column, list) and column and not isinstance(column[0], dict)
        for column in columns
    )
    if is_list and len({len(column) for column in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return None
