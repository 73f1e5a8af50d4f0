"""Rows of a source on disk as messages, and the report about them.

The first reading of a source writes an Arrow file into the cache; its key has the content's hash
and the settings. Later readings memory-map it. Every row that is left out is counted, with its
reason and its place.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jetson_ft.data import layouts
from jetson_ft.data.formats import TEXT, RowError
from jetson_ft.data.layouts import NO_COLUMNS, Conversation
from jetson_ft.data.readers import read_rows
from jetson_ft.data.report import FIXES, MAX_NAME, ReadReport, check_dropped
from jetson_ft.data.sources import Source
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import cache_dir, cached_sha256, printable, read_json, staged, write_json
from jetson_ft.recipe import DataRecipe, Layout

if TYPE_CHECKING:
    import datasets

_VERSION = 8  # increase when the columns or the report change

_DETECTION_ROWS = 100  # that decide about the layout
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 22

# Number, hash, messages, tools, category.
_UsableRow = tuple[int, int, list[dict[str, Any]], str, str]


def read_source(
    source: Source,
    *,
    layout: str = "auto",
    encoding: str = "auto",
    on_invalid: str = "error",
    columns: Mapping[str, str] = NO_COLUMNS,
) -> tuple[datasets.Dataset, ReadReport]:
    """Return the usable rows of a source, memory-mapped.

    They have the columns `row`, `messages` (role, content, train, tool_calls), `tools` and
    `category`.

    Args:
        columns: names of columns by purpose, as `data.columns` has them.

    Raises:
        UserError: the source can't be read, or has no usable row, or has unusable ones and
            `on_invalid` is `error` and not `skip`.
    """
    rows, report = read_cached(source, layout, encoding, on_invalid, columns)
    return rows.remove_columns("hash"), report


def columns_of(source: Source, encoding: str, columns: Mapping[str, str]) -> Mapping[str, str]:
    """Return those of the chosen columns that the source has.

    A question and an answer are a pair: where one of them is missing, neither is returned.
    """
    return _present_columns(_first_rows(source, encoding), columns) if columns else NO_COLUMNS


def heldout_settings(source: Source, data: DataRecipe) -> tuple[str, Mapping[str, str]]:
    """Return the layout and the columns for held-out rows.

    The layout is `data.format` where most of the first rows have that; else it is detected. Where
    the training rows are set to be text, rows of no known layout are text too.
    """
    chosen = data.columns.chosen()
    if data.format == "auto" and not chosen:
        return "auto", NO_COLUMNS
    first_rows = _first_rows(source, "auto")
    columns = _present_columns(first_rows, chosen)
    if data.format == "auto":
        return "auto", columns
    matching = sum(layouts.has_layout(row, data.format, columns) for row in first_rows)
    if 2 * matching > len(first_rows):
        return data.format, columns
    is_known = any(layouts.detect_layout(row, columns) for row in first_rows)
    return "text" if data.format == "text" and not is_known else "auto", columns


def hashes(rows: datasets.Dataset) -> Any:
    """Return the column as an array; `rows` must be whole or a slice, not picked rows."""
    return rows.data.column("hash").to_numpy()


def read_cached(
    source: Source, layout: str, encoding: str, on_invalid: str, columns: Mapping[str, str]
) -> tuple[datasets.Dataset, ReadReport]:
    """Return the rows with the column `hash` too, from the cache; write them first if missing."""
    import datasets
    import numpy as np

    sums = [cached_sha256(path) for path in source.files]
    # Suffixes take part in the detection.
    suffixes = [path.suffixes[-2:] for path in source.files]
    parts = [_VERSION, sums, suffixes, layout, encoding, on_invalid, sorted(columns.items())]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    rows_file = cache_dir("data") / f"{key}.arrow"
    report_file = rows_file.with_suffix(".json")
    try:
        report = ReadReport(**read_json(report_file))
        rows = open_arrow(rows_file)
    except (UserError, TypeError):  # missing or damaged
        rows = None
    if rows and len(rows) == report.rows_kept:
        for entry, path in zip(report.files, source.files, strict=True):
            entry["path"] = printable(str(path))  # equal content may be from another file
        return rows, report
    report = _write_cache(source, layout, encoding, on_invalid, columns, rows_file)
    if [cached_sha256(path) for path in source.files] != sums:
        rows_file.unlink()
        raise UserError(_("The data changed while it was read."), source.name, _("Start again."))
    rows = datasets.Dataset.from_file(str(rows_file))
    report.cache_key = key
    report.duplicates = len(rows) - len(np.unique(hashes(rows)))
    write_json(report_file, asdict(report))
    return rows, report


def open_arrow(path: Path) -> datasets.Dataset | None:
    """Return the rows of an Arrow file; None if it is missing or damaged.

    A file that is cut between two batches has less rows.
    """
    import datasets
    import pyarrow as pa

    try:
        return datasets.Dataset.from_file(str(path))
    except (pa.ArrowException, OSError):
        return None


def _write_cache(
    source: Source,
    layout: str,
    encoding: str,
    on_invalid: str,
    columns: Mapping[str, str],
    path: Path,
) -> ReadReport:
    """Read the source into the file; after an error there is no file."""
    import pyarrow as pa

    fields = ("role", pa.string()), ("content", pa.string())
    more = ("train", pa.bool_()), ("tool_calls", pa.string())
    messages = pa.list_(pa.struct([*fields, *more]))
    texts = ("tools", pa.string()), ("category", pa.string())
    schema = pa.schema([("row", pa.int64()), ("hash", pa.uint64()), ("messages", messages), *texts])
    first_rows = _first_rows(source, encoding) if columns or layout == "auto" else []
    if (missing := _missing_column(first_rows, columns, source, encoding)) is not None:
        raise missing
    chosen = cast(Layout, layout)
    if layout == "auto":
        chosen = _detect_layout(first_rows, columns, source, encoding)
    report = ReadReport([], "", chosen, "", "")
    usable = _usable_rows(source, chosen, encoding, columns, report)
    with staged(path) as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(usable):
                writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=schema))
        check_dropped(report, on_invalid, source.name)
    sums = [info["sha256"] for info in report.files]
    combined = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    report.sha256 = sums[0] if len(sums) == 1 else combined
    kinds = [".".join(filter(None, (f["container"], f["compression"]))) for f in report.files]
    report.container = ", ".join(dict.fromkeys(kinds))
    names = dict.fromkeys(info["encoding"] for info in report.files)
    report.encoding = ", ".join(name for name in names if name)  # Parquet has none
    return report


def _first_rows(source: Source, encoding: str) -> list[dict[str, Any]]:
    """Return the first readable rows, which decide about the layout."""
    rows = itertools.chain.from_iterable(read_rows(path, encoding)[1] for path in source.files)
    values = (row.value for row in rows if isinstance(row.value, dict))
    return list(itertools.islice(values, _DETECTION_ROWS))


def _present_columns(
    first_rows: list[dict[str, Any]], columns: Mapping[str, str]
) -> Mapping[str, str]:
    """Return those of the chosen columns that the rows have, as `columns_of` describes."""
    names = {name for row in first_rows for name in row}
    present = {purpose: name for purpose, name in columns.items() if name in names}
    if any(part in columns and part not in present for part in ("question", "answer")):
        present = {k: name for k, name in present.items() if k not in ("question", "answer")}
    return present


def _missing_column(
    first_rows: list[dict[str, Any]], columns: Mapping[str, str], source: Source, encoding: str
) -> UserError | None:
    """Return the error for a chosen column that no row has; None if every one is there."""
    names = dict.fromkeys(name for row in first_rows for name in row)
    for purpose, name in columns.items():
        if first_rows and name not in names:
            shown, keys = _shown_names(list(names), source, encoding)
            near = difflib.get_close_matches(name, shown, 1)
            others = (
                _("Name one of these columns.") if shown else _("Name a column of its first line.")
            )
            return UserError(
                _("The rows have no column `{name}`; they have {keys}."),
                f"data.columns.{purpose}",
                _("Did you mean `{near}`?") if near else others,
                name=name,
                keys=keys,
                near=near[0] if near else "",
            )
    return None


def _detect_layout(
    first_rows: list[dict[str, Any]], columns: Mapping[str, str], source: Source, encoding: str
) -> Layout:
    """Return the layout that most of the rows have."""
    if not first_rows:
        return "messages"  # any will do: the reading reports what is malformed
    detected = (layouts.detect_layout(row, columns) for row in first_rows)
    counts = Counter(layout for layout in detected if layout)
    if counts:
        return counts.most_common(1)[0][0]
    if any(layouts.rejected_column(row) for row in first_rows):
        return "alpaca"  # the reading reports that these are preference pairs
    raise UserError(
        _("The rows have no known layout; the first one has {keys}."),
        source.name,
        _(
            "Name the fields `instruction` and `output` (or `prompt` and `response`, `question` "
            "and `answer`), or give `conversations` (ShareGPT) or `messages` (OpenAI). Columns of "
            "other names: `--set data.columns.question=NAME --set data.columns.answer=NAME`. "
            "Plain text: `--set data.columns.text=NAME`."
        ),
        keys=_shown_names(list(first_rows[0]), source, encoding)[1],
    )


def _shown_names(
    names: list[str], source: Source, encoding: str
) -> tuple[list[str], str | Message]:
    """Return those of the columns' names that a message may show, and the text with them.

    Any text can be read as CSV. Without usable rows its first line may be a secret.
    """
    if any(read_rows(path, encoding)[0].container == "csv" for path in source.files):
        return [], Message(_("{count} columns of other names"), {"count": len(names)})
    return names, ", ".join(f"`{printable(name)[:MAX_NAME]}`" for name in names[:10]) or "{}"


def _usable_rows(
    source: Source, layout: Layout, encoding: str, columns: Mapping[str, str], report: ReadReport
) -> Iterator[_UsableRow]:
    """Yield the rows of all files as messages, numbered through; fill in the report."""
    for path in source.files:
        info, rows = read_rows(path, encoding)
        for row in rows:
            report.rows_read += 1
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                conversation = layouts.to_conversation(row.value, layout, columns)
            except RowError as error:
                reason = error.reason
                other = None
                if isinstance(row.value, dict) and reason.template not in FIXES:
                    other = layouts.detect_layout(row.value, columns)
                if other and other != layout:
                    template = _("layout `{other}` among rows of layout `{layout}`")
                    reason = Message(template, {"other": other, "layout": layout})
                template = _("line {line}") if row.line else _("row {row}")
                place = Message(template, {"line": row.line, "row": row.number})
                if len(source.files) > 1:
                    name = printable(path.name)
                    place = Message("{file} {place}", {"file": name, "place": place})
                report.drop(reason, place)
                continue
            report.rows_kept += 1
            for name in conversation.unread:
                report.add_unread(name)
            for message in conversation.messages:
                side = "answer" if message["role"] in ("assistant", TEXT) else "question"
                report.characters[side] += len(message["content"])
            category = layouts.category_of(row.value, columns)
            yield report.rows_read, *_stored(conversation), category
        for key, count in info.unread_lists.items():
            report.add_unread(f"{key}[]", count)
        report.files.append(asdict(info) | {"path": printable(str(path))})


def _stored(conversation: Conversation) -> tuple[int, list[dict[str, Any]], str]:
    """Return the hash of the conversation's text, its messages with every field, its tools."""
    messages = [{"train": True, "tool_calls": "", **message} for message in conversation.messages]
    texts = [[message["role"], message["content"], message["tool_calls"]] for message in messages]
    text = json.dumps([texts, conversation.tools], ensure_ascii=False).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little"), messages, conversation.tools


def _batches(rows: Iterator[_UsableRow]) -> Iterator[list[_UsableRow]]:
    """Yield batches whose rows and characters are bounded, as memory is."""
    batch: list[_UsableRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row[3]) + sum(len(message["content"]) for message in row[2])
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
