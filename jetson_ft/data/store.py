"""Rows on disk as messages, the report about them, and the held-out split.

The first reading of a source writes an Arrow file into the cache; its key has the content's hash
and the settings. Later readings memory-map it. Every row that is left out is counted, with its
reason and its place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jetson_ft.data import formats
from jetson_ft.data.formats import ChatMessage, RowError
from jetson_ft.data.readers import read_rows
from jetson_ft.data.sources import BUNDLED, Source, resolve_source
from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.files import cache_dir, cached_sha256, printable, read_json, staged, write_json
from jetson_ft.recipe import DataRecipe, Layout

if TYPE_CHECKING:
    import datasets

_VERSION = 4  # increase when the columns or the report change

_DETECTION_ROWS = 100  # that decide about the layout
_MAX_PLACES = 20  # kept of the rows left out for one reason
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 22

_UsableRow = tuple[int, int, list[ChatMessage]]  # number, hash, messages


@dataclass
class ReadReport:
    """What was read from a source, and what is usable.

    `dropped` has the rows left out by their reason in English: `count`, the first places (`where`,
    English), and both as `errors.Message.as_json` gives them (`message`, `places`).
    """

    files: list[dict[str, Any]]
    container: str
    layout: str
    encoding: str
    sha256: str
    cache_key: str = ""  # of the content, the settings and this module's version
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    duplicates: int = 0
    empty_answers: int = 0
    characters: dict[str, int] = field(default_factory=lambda: {"question": 0, "answer": 0})

    def drop(self, reason: Message, place: Message) -> None:
        """Count a row that is left out."""
        empty = {"count": 0, "where": [], "message": reason.as_json(), "places": []}
        entry = self.dropped.setdefault(str(reason), empty)
        entry["count"] += 1
        self.empty_answers += reason.template == formats.NO_ANSWER
        if len(entry["where"]) < _MAX_PLACES:
            entry["where"].append(str(place))
            entry["places"].append(place.as_json())


@dataclass(frozen=True)
class SplitInfo:
    """The result of `split_rows`, for reports."""

    train: ReadReport
    heldout: ReadReport | None  # None: the rows come from the end of the training source
    heldout_from: str
    train_rows: int
    heldout_rows: int
    left_out: int  # training rows left out because they are in the held-out set too


def read_source(
    source: Source, *, layout: str = "auto", encoding: str = "auto", on_invalid: str = "error"
) -> tuple[datasets.Dataset, ReadReport]:
    """Return the usable rows of a source, memory-mapped, with the columns `row` and `messages`.

    Raises:
        UserError: the source can't be read, or has no usable row, or has unusable ones and
            `on_invalid` is `error` and not `skip`.
    """
    rows, report = _read_cached(source, layout, encoding, on_invalid)
    return rows.remove_columns("hash"), report


def split_rows(data: DataRecipe) -> tuple[datasets.Dataset, datasets.Dataset, SplitInfo]:
    """Return training and held-out rows; no conversation is in both.

    Raises:
        UserError: as `read_source`, or no training row is left.
    """
    import numpy as np

    rows, report = _read_cached(
        resolve_source(data.train), data.format, data.encoding, data.on_invalid
    )
    source = heldout_report = None
    name = data.train if data.heldout == "auto" else data.heldout
    if name in BUNDLED:
        source = Source(f"{name} held-out rows", (BUNDLED[name].heldout,))
    elif isinstance(data.heldout, str) and data.heldout != "auto":
        source = resolve_source(data.heldout)
    if source:
        train_rows = rows
        heldout_rows, heldout_report = _read_cached(source, "auto", "auto", data.on_invalid)
    else:
        count = data.heldout if isinstance(data.heldout, int) else max(1, min(60, len(rows) // 10))
        if count >= len(rows):
            raise UserError(
                _("No training row is left: {heldout} of {rows} rows are to be held out."),
                data.train,
                _("Add rows, or set `data.heldout` to a smaller number or a file."),
                heldout=count,
                rows=len(rows),
            )
        train_rows = rows.select(range(len(rows) - count))
        heldout_rows = rows.select(range(len(rows) - count, len(rows)))
    remaining = np.flatnonzero(~np.isin(_hashes(train_rows), _hashes(heldout_rows)))
    if not len(remaining):
        raise UserError(
            _("No training row is left: every one is in the held-out set too."),
            data.train,
            _("Set `data.heldout` to other rows, or to fewer."),
        )
    info = SplitInfo(
        train=report,
        heldout=heldout_report,
        heldout_from=source.name if source else f"the end of {data.train}",
        train_rows=len(remaining),
        heldout_rows=len(heldout_rows),
        left_out=len(train_rows) - len(remaining),
    )
    train_rows = train_rows.select(remaining).remove_columns("hash")
    return train_rows, heldout_rows.remove_columns("hash"), info


def _hashes(rows: datasets.Dataset) -> Any:
    """Return the column as an array; `rows` must be whole or a slice, not picked rows."""
    return rows.data.column("hash").to_numpy()


def _read_cached(
    source: Source, layout: str, encoding: str, on_invalid: str
) -> tuple[datasets.Dataset, ReadReport]:
    """Return the rows with their hashes from the cache; write them first if they are missing."""
    import datasets
    import numpy as np

    sums = [cached_sha256(path) for path in source.files]
    suffixes = [path.suffix for path in source.files]  # they take part in the detection
    parts = [_VERSION, sums, suffixes, layout, encoding, on_invalid]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    rows_file = cache_dir("data") / f"{key}.arrow"
    report_file = rows_file.with_suffix(".json")
    try:
        report = ReadReport(**read_json(report_file))
        rows = open_arrow(rows_file, report.rows_kept)
    except (UserError, TypeError):  # missing or damaged
        rows = None
    if rows:
        for entry, path in zip(report.files, source.files, strict=True):
            entry["path"] = printable(str(path))  # equal content may be from another file
        return rows, report
    report = _write_cache(source, layout, encoding, on_invalid, rows_file)
    if [cached_sha256(path) for path in source.files] != sums:
        rows_file.unlink()
        raise UserError(_("The data changed while it was read."), source.name, _("Start again."))
    rows = datasets.Dataset.from_file(str(rows_file))
    report.cache_key = key
    report.duplicates = len(rows) - len(np.unique(_hashes(rows)))
    write_json(report_file, asdict(report))
    return rows, report


def open_arrow(path: Path, count: int) -> datasets.Dataset | None:
    """Return the rows of an Arrow file; None if it is missing, incomplete or damaged."""
    import datasets
    import pyarrow as pa

    try:
        rows = datasets.Dataset.from_file(str(path))
    except (pa.ArrowException, OSError):
        return None
    return rows if len(rows) == count else None


def _write_cache(
    source: Source, layout: str, encoding: str, on_invalid: str, path: Path
) -> ReadReport:
    """Read the source into the file; after an error there is no file."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [("row", pa.int64()), ("hash", pa.uint64()), ("messages", pa.list_(message))]
    )
    chosen = _detect_layout(source, encoding) if layout == "auto" else cast(Layout, layout)
    report = ReadReport([], "", chosen, "", "")
    with staged(path) as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(_usable_rows(source, chosen, encoding, report)):
                writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=schema))
        _check_dropped(report, on_invalid, source.name)
    sums = [info["sha256"] for info in report.files]
    combined = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    report.sha256 = sums[0] if len(sums) == 1 else combined
    report.container = ", ".join(dict.fromkeys(info["container"] for info in report.files))
    names = dict.fromkeys(info["encoding"] for info in report.files)
    report.encoding = ", ".join(name for name in names if name)  # Parquet has none
    return report


def _detect_layout(source: Source, encoding: str) -> Layout:
    """Return the layout that most of the first readable rows have."""
    rows = itertools.chain.from_iterable(read_rows(path, encoding)[1] for path in source.files)
    values = (row.value for row in rows if isinstance(row.value, dict))
    first_rows = list(itertools.islice(values, _DETECTION_ROWS))
    if not first_rows:
        return "messages"  # any will do: the reading reports what is malformed
    counts = Counter(layout for row in first_rows if (layout := formats.detect_layout(row)))
    if counts:
        return counts.most_common(1)[0][0]
    raise UserError(
        _("The rows have no known layout; the first one has {keys}."),
        source.name,
        _(
            "Name the fields `instruction` and `output` (or `prompt` and `response`, `question` "
            "and `answer`), or give `conversations` (ShareGPT) or `messages` (OpenAI)."
        ),
        keys=", ".join(f"`{printable(str(key))[:40]}`" for key in list(first_rows[0])[:10]) or "{}",
    )


def _usable_rows(
    source: Source, layout: Layout, encoding: str, report: ReadReport
) -> Iterator[_UsableRow]:
    """Yield the rows of all files as messages, numbered through; fill in the report."""
    for path in source.files:
        info, rows = read_rows(path, encoding)
        report.files.append(asdict(info) | {"path": printable(str(path))})
        for row in rows:
            report.rows_read += 1
            try:
                if isinstance(row.value, RowError):
                    raise row.value
                messages = formats.to_messages(row.value, layout)
            except RowError as error:
                reason = error.reason
                other = formats.detect_layout(row.value) if isinstance(row.value, dict) else None
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
            for message in messages:
                side = "answer" if message["role"] == "assistant" else "question"
                report.characters[side] += len(message["content"])
            text = json.dumps(messages, ensure_ascii=False).encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            yield report.rows_read, int.from_bytes(digest, "little"), messages


def _batches(rows: Iterator[_UsableRow]) -> Iterator[list[_UsableRow]]:
    """Yield batches whose rows and characters are bounded, as memory is."""
    batch: list[_UsableRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(message["content"]) for message in row[2])
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_dropped(report: ReadReport, on_invalid: str, name: str) -> None:
    """Raise a UserError if rows are unusable and may not be skipped, or if all are unusable."""
    if report.rows_kept and (on_invalid == "skip" or not report.dropped):
        return
    reasons = []
    for entry in report.dropped.values():
        reason, count = Message.from_json(entry["message"]), entry["count"]
        places = [Message.from_json(place) for place in entry["places"]]
        if count > len(places):
            places.append(Message("…"))
        values = {"reason": reason, "count": count, "places": joined(places, ", ")}
        reasons.append(Message(_("{reason}: {count} ({places})"), values))
    raise UserError(
        _("{unusable} of {rows} rows can't be used:\n  - {reasons}"),
        name,
        _("Fix the rows, or leave them out with `--set data.on_invalid=skip`.")
        if report.rows_kept
        else _("Fix the rows."),
        unusable=report.rows_read - report.rows_kept,
        rows=report.rows_read,
        reasons=joined(reasons, "\n  - "),
    )
