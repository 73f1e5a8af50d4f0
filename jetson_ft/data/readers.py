"""Read a file's rows as a stream: JSON and JSON Lines (`json_rows`), CSV, Parquet.

What a row means is not here (see `formats`). Memory stays within a few times the largest row.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jetson_ft.data import encodings, json_rows
from jetson_ft.data.formats import RowError
from jetson_ft.data.json_rows import LocatedValue, parse_json
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import cached_sha256, disk_errors, printable

Container = Literal["json", "jsonl", "csv", "parquet"]
SUFFIXES = tuple(f".{container}" for container in get_args(Container))
_HEAD_CHARACTERS = 1 << 16  # enough to tell JSON from JSON Lines and CSV


@dataclass(frozen=True)
class FileInfo:
    """A data file's properties; `size` in bytes.

    `key` is that of the list of rows, where the file is one JSON object with such a list.
    """

    path: Path
    container: Container
    encoding: str
    size: int
    sha256: str
    key: str = ""


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
    sha256, size, key = cached_sha256(path), path.stat().st_size, ""
    with disk_errors(path), path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        encoding, rows = "", _read_parquet(path)
    else:
        if encoding == "auto":
            encoding = encodings.detect_encoding(path)
        encoding, head = encodings.check_encoding(encoding), ""
        for text in encodings.decode_file(path, encoding):
            head = (head + text).lstrip()
            if len(head) >= _HEAD_CHARACTERS:
                break
        container = _detect_container(head, path.suffix.lower())
        if not head:
            rows = iter(())
        elif container == "json":
            key = json_rows.list_key(path, encoding)
            rows = json_rows.read_json(path, encoding, key)
        elif container == "jsonl":
            rows = json_rows.read_jsonl(path, encoding)
        else:
            rows = _read_csv(path, encoding, head.partition("\n")[0])
    return FileInfo(path, container, encoding, size, sha256, key), _numbered(path, rows)


def _detect_container(head: str, suffix: str) -> Container:
    """Return the container by the first lines; the suffix decides where those are ambiguous."""
    if head.startswith("["):
        return "json"
    if suffix == ".jsonl":
        return "jsonl"
    if not head.startswith("{"):
        return "json" if suffix == ".json" else "csv"
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
    delimiter = max(",;\t", key=first_line.count)
    reader = csv.reader(encodings.read_lines(path, encoding), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            invalid = RowError(_("not valid CSV ({reason})"), reason=str(error))
            if str(error) == "unexpected end of data":  # a quote that is never closed
                invalid = RowError(json_rows.UNREADABLE_REST, reason=invalid.reason)
            yield line, invalid
            continue
        if not cells:
            continue
        if not header:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise UserError(
                    _("The first line of a CSV file must name the columns, each differently."),
                    Message(_("{path}, line {line}"), {"path": str(path), "line": line}),
                    _("Put a header above the rows, such as `instruction,input,output`."),
                )
        elif len(cells) != len(header):
            template = _("{cells} cells where the header has {header}")
            yield line, RowError(template, cells=len(cells), header=len(header))
        else:
            yield line, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[LocatedValue]:
    """Yield the rows; a damaged file ends with a `RowError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # Small batches, since a row can be large.
            for batch in file.iter_batches(batch_size=64):
                yield from ((None, value) for value in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        damage = RowError(_("damaged Parquet ({reason})"), reason=printable(str(error)))
        yield None, RowError(json_rows.UNREADABLE_REST, reason=damage.reason)


def _numbered(path: Path, rows: Iterator[LocatedValue]) -> Iterator[NumberedRow]:
    number = 0
    for number, (line, value) in enumerate(rows, 1):
        if not isinstance(value, dict | RowError):
            value = RowError(_("null instead of a row") if value is None else _("not an object"))
        yield NumberedRow(number, line, value)
    if not number:
        raise UserError(_("This file has 0 rows."), str(path), _("Choose a file with rows in it."))
