"""Read a file's rows as a stream: JSON and JSON Lines (`json_rows`), CSV, Parquet, plain text.

Text files can be compressed (`compression`).

What a row means is not here (see `formats`). Memory stays within a few times the largest row.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from jetson_ft.data import compression, encodings, json_rows
from jetson_ft.data.compression import TEXT_SUFFIXES, Compression
from jetson_ft.data.formats import PAIRS, RowError
from jetson_ft.data.json_rows import LocatedValue, parse_json
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import cached_sha256, printable

Container = Literal["json", "jsonl", "csv", "txt", "parquet"]
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".zip")
_HEAD_CHARACTERS = 1 << 16  # enough to tell JSON from JSON Lines and CSV


@dataclass(frozen=True)
class FileInfo:
    """A data file's properties; `size` in bytes.

    `key` is that of the list of rows, where the file is one JSON object with such a list;
    `unread_lists` gets the lengths of the other lists (test rows) while the rows are read.
    """

    path: Path
    container: Container
    encoding: str
    size: int
    sha256: str
    key: str = ""
    compression: Compression = ""
    unread_lists: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class NumberedRow:
    """One row with its number and, in a text file, the line it starts on; both count from 1.

    A row that can't be read has a `RowError` as its value, so that the caller can count it.
    """

    number: int
    line: int | None
    value: dict[str, Any] | RowError


def read_rows(path: Path, encoding: str = "auto") -> tuple[FileInfo, Iterator[NumberedRow]]:
    """Return the file's properties and its rows as a stream.

    Raises:
        UserError: the file is not readable, or its encoding can't be detected; while iterating:
            a byte is not text in that encoding, or there are no rows.
    """
    container: Container = "parquet"
    sha256, stat, key = cached_sha256(path), path.stat(), ""
    packed, name, start = compression.inspect_file(path)
    unread: dict[str, int] = {}
    head = ""
    if start.startswith(b"PAR1"):
        encoding, rows = "", _read_parquet(path)
    else:
        if encoding == "auto":
            encoding = _detect_encoding(path, sha256)
        encoding = encodings.check_encoding(encoding)
        for text in encodings.decode_file(path, encoding):
            head = (head + text).lstrip()
            if len(head) >= _HEAD_CHARACTERS:
                break
        container = _detect_container(head, Path(name).suffix.lower())
        if not head:
            rows = iter(())
        elif container == "json":
            key = json_rows.list_key(path, encoding)
            rows = json_rows.read_json(path, encoding, key, unread)
        elif container == "jsonl":
            rows = json_rows.read_jsonl(path, encoding)
        elif container == "txt":
            rows = _read_text(path, encoding)
        else:
            rows = _read_csv(path, encoding, head.partition("\n")[0])
    info = FileInfo(path, container, encoding, stat.st_size, sha256, key, packed, unread)
    return info, _numbered(path, rows, head.startswith("{") and not key)


@lru_cache(maxsize=64)
def _detect_encoding(path: Path, sha256: str) -> str:
    """Return `encodings.detect_encoding`, which reads the whole file; cached until it changes.

    Before a run a file is opened for its columns, its layout and its rows.
    """
    return encodings.detect_encoding(path)


def _detect_container(head: str, suffix: str) -> Container:
    """Return the container by the first lines; the suffix decides where those are ambiguous."""
    first_line = head.partition("\n")[0]
    if suffix == ".txt" and not re.match(r'\{\s*"|\[\s*[\[{"]', head):
        # A table's header has a question's and an answer's name.
        cells = {cell.strip('\r "').casefold() for cell in re.split("[,;\t]", first_line)}
        return "csv" if any(cells >= set(pair) for pair in PAIRS) else "txt"
    if head.startswith("["):
        try:  # a conversation is a list too: a file of those has one on each line
            item, _end = json.JSONDecoder().raw_decode(head[1:].lstrip())
        except (ValueError, RecursionError):
            item = None
        keys = item.keys() if isinstance(item, dict) else set()
        is_turn = {"role", "content"} <= keys or {"from", "value"} <= keys
        is_line = first_line == head or isinstance(parse_json(first_line), list)
        return "jsonl" if is_turn and is_line else "json"
    if not head.startswith("{"):
        by_suffix: dict[str, Container] = {".json": "json", ".jsonl": "jsonl"}
        return by_suffix.get(suffix, "csv")
    if first_line.strip() == "{":
        return "json"
    try:  # an object over several lines, or several on one line
        end = json.JSONDecoder().raw_decode(head)[1]
        if "\n" in head[:end] or head[end:].lstrip(" \t\r").startswith("{"):
            return "json"
    except (ValueError, RecursionError):
        pass
    if suffix == ".jsonl":
        return "jsonl"
    # JSON Lines: one of the first lines is a whole object and another object follows.
    lines = [line for line in head.split("\n", 20)[:20] if line.strip()]
    is_jsonl = any(
        isinstance(parse_json(line), dict) and following.startswith("{")
        for line, following in itertools.pairwise(lines)
    ) or (len(lines) > 1 and isinstance(parse_json(lines[-1]), dict))
    return "jsonl" if is_jsonl else "json"


def _read_csv(path: Path, encoding: str, first_line: str) -> Iterator[LocatedValue]:
    """Yield each record that is not blank, with the line it starts on; every cell is text.

    The delimiter is the commonest one in `first_line`, the first that is not blank.
    """
    csv.field_size_limit(encodings.MAX_ROW_CHARACTERS)
    lines: Iterator[str] = encodings.read_lines(path, encoding)
    first_line = re.sub('"[^"]*"', "", first_line)
    delimiter = max(",;\t", key=first_line.count)
    if declared := re.fullmatch(r"sep=(.)\s*", first_line):  # Excel's own line above the header
        delimiter = declared[1]
        blank = list(itertools.takewhile(lambda line: not line.strip("\ufeff \t\r\n"), lines))
        lines = itertools.chain(blank, ["\n"], lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            count = reader.line_num - line + 1
            invalid = RowError(_("not valid CSV ({reason})"), reason=str(error))
            if str(error) == "unexpected end of data":
                unclosed = _("a quote that is never closed (lines after it: {count})")
                reason = RowError(unclosed, count=count - 1).reason
                invalid = RowError(json_rows.UNREADABLE_REST, reason=reason)
            elif count > 1:
                template = _("not valid CSV ({reason}; lines read as one row: {count})")
                invalid = RowError(template, reason=str(error), count=count)
            yield line, invalid
            continue
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            while header and not header[-1]:
                header.pop()
            if len(set(header)) < len(header):
                raise UserError(
                    _("The first line of a CSV file must name the columns, each differently."),
                    Message(_("{path}, line {line}"), {"path": str(path), "line": line}),
                    _("Put a header above the rows, such as `instruction,input,output`."),
                )
            continue
        while len(cells) > len(header) and not cells[-1]:  # columns without a name and content
            cells.pop()
        if len(cells) != len(header):
            template = _("{cells} cells where the header has {header}")
            yield line, RowError(template, cells=len(cells), header=len(header))
        else:
            yield line, dict(zip(header, cells, strict=True))


def _read_text(path: Path, encoding: str) -> Iterator[LocatedValue]:
    """Yield the whole file as one text."""
    blocks, length = [], 0
    for block in encodings.decode_file(path, encoding):
        blocks.append(block)
        length += len(block)
        if length > encodings.MAX_ROW_CHARACTERS:
            limit = encodings.MAX_ROW_CHARACTERS >> 20
            yield 1, RowError(_("longer than {limit} Mi characters"), limit=limit)
            return
    yield 1, "".join(blocks).removeprefix("\ufeff")


def _read_parquet(path: Path) -> Iterator[LocatedValue]:
    """Yield the rows; a damaged file ends with a `RowError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # Small batches, since a row can be large.
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield None, {name: _without_nulls(value) for name, value in row.items()}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        damage = RowError(_("damaged Parquet ({reason})"), reason=printable(str(error)))
        yield None, RowError(json_rows.UNREADABLE_REST, reason=damage.reason)


def _without_nulls(value: Any) -> Any:
    """Return a Parquet value without the null fields of its structs.

    A struct has the fields of all rows. In a row without one of them, such as an argument of
    another tool, the field is null.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _without_frame(rows: Iterator[LocatedValue]) -> Iterator[LocatedValue]:
    """Yield the values; the rows of a table in the first one's place."""
    for position, (line, value) in enumerate(rows):
        table = json_rows.rows_of_frame(value) if position == 0 else None
        yield from [(line, value)] if table is None else ((line, row) for row in table)


def _numbered(path: Path, rows: Iterator[LocatedValue], is_objects: bool) -> Iterator[NumberedRow]:
    """Yield the rows with their numbers; `is_objects`: the file has JSON objects in succession."""
    number = 0
    if is_objects:
        rows = _without_frame(rows)
    for number, (line, value) in enumerate(rows, 1):
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {"messages": value}  # a conversation as it is
        elif isinstance(value, str):
            value = {"text": value}
        elif not isinstance(value, dict | RowError):
            value = RowError(_("null instead of a row") if value is None else _("not an object"))
        yield NumberedRow(number, line, value)
    if not number:
        raise UserError(_("This file has 0 rows."), str(path), _("Choose a file with rows in it."))
