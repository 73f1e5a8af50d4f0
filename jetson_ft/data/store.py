"""Rows kept as messages on disk: read once, memory-mapped from then on.

The first reading of a source writes an Arrow file into the cache, under a key made of the
content's hash and the settings; later ones map it. Every row that was left out is counted,
with its reason and its place. `split` keeps the held-out rows apart from the training rows.
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
from jetson_ft.data.formats import Layout, Message, RowError
from jetson_ft.data.read import (
    Broken,
    FileInfo,
    Source,
    bundled_heldout,
    file_sha256,
    read_rows,
    resolve,
    shown,
)
from jetson_ft.errors import UserError
from jetson_ft.paths import cache_dir, read_json, staged, write_json

if TYPE_CHECKING:
    import datasets

STORE_VERSION = 1

_ROWS_LOOKED_AT = 100  # to tell the layout
_PLACES_KEPT = 20
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 22

_Row = tuple[int, str, dict[str, Any] | Broken]  # number, place, value
_Kept = tuple[int, int, list[Message]]  # number, hash, messages


@dataclass
class ReadReport:
    """What was read from a source and what became of it."""

    files: list[dict[str, Any]]
    container: str
    layout: str
    encoding: str
    sha256: str
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    duplicates: int = 0
    empty_answers: int = 0
    characters: dict[str, int] = field(default_factory=lambda: {"question": 0, "answer": 0})

    def drop(self, reason: str, place: str) -> None:
        """Counts a row that can't be used; the first places are kept."""
        entry = self.dropped.setdefault(reason, {"count": 0, "where": []})
        entry["count"] += 1
        self.empty_answers += reason == formats.NO_ANSWER
        if len(entry["where"]) < _PLACES_KEPT:
            entry["where"].append(place)

    def keep(self, messages: list[Message]) -> None:
        """Counts a row that is used."""
        self.rows_kept += 1
        for message in messages:
            side = "answer" if message["role"] == "assistant" else "question"
            self.characters[side] += len(message["content"])


@dataclass(frozen=True)
class SplitInfo:
    """How training and held-out rows were told apart."""

    train: ReadReport
    heldout: ReadReport | None  # None: the rows come from the end of the training source
    heldout_from: str
    train_rows: int
    heldout_rows: int
    left_out: int  # train rows left out because they stand in the held-out set


def read(
    source: Source, *, layout: str = "auto", encoding: str = "auto", bad_rows: str = "refuse"
) -> tuple[datasets.Dataset, ReadReport]:
    """The usable rows of a source, memory-mapped, with the columns `row` and `messages`.

    Args:
        layout: `alpaca`, `sharegpt`, `messages`, or `auto`.
        encoding: of text files, or `auto`.
        bad_rows: `refuse` a source with unusable rows, or `skip` and count them.

    Raises:
        UserError: the source can't be read, has unusable rows (`refuse`) or no usable one.
    """
    stored, report = _stored(source, layout, encoding, bad_rows)
    return stored.remove_columns("hash"), report


def split(
    train: Source,
    heldout: int | str,
    *,
    layout: str = "auto",
    encoding: str = "auto",
    bad_rows: str = "refuse",
) -> tuple[datasets.Dataset, datasets.Dataset, SplitInfo]:
    """Training and held-out rows; no conversation is in both.

    Args:
        heldout: a number of rows from the end of `train`, a name as `resolve` takes it, or
            `auto` (the bundled set for bundled data, else the last min(60, 10 %) rows).
    """
    import numpy as np

    rows, report = _stored(train, layout, encoding, bad_rows)
    other = _heldout_source(train, heldout)
    if other:
        learnt = rows
        held, held_report = _stored(other, "auto", "auto", bad_rows)
    else:
        count = _heldout_count(len(rows), heldout, train.name)
        learnt = rows.select(range(len(rows) - count))
        held, held_report = rows.select(range(len(rows) - count, len(rows))), None
    remaining = np.flatnonzero(~np.isin(_hashes(learnt), _hashes(held)))
    if not len(remaining):
        raise UserError(
            "No training row is left: every one stands in the held-out set too.",
            train.name,
            "Name other rows, or fewer, as `data.heldout`.",
        )
    info = SplitInfo(
        train=report,
        heldout=held_report,
        heldout_from=other.name if other else f"the end of {train.name}",
        train_rows=len(remaining),
        heldout_rows=len(held),
        left_out=len(learnt) - len(remaining),
    )
    return learnt.select(remaining).remove_columns("hash"), held.remove_columns("hash"), info


def _heldout_source(train: Source, heldout: int | str) -> Source | None:
    """Where the held-out rows come from; None: the end of the training source."""
    if heldout == "bundled" or (heldout == "auto" and train.kind == "bundled"):
        return Source("bundled", "bundled held-out rows", (bundled_heldout(),))
    return None if isinstance(heldout, int) or heldout == "auto" else resolve(heldout)


def _heldout_count(rows: int, heldout: int | str, name: str) -> int:
    if isinstance(heldout, int) and heldout >= rows:
        what = f"No training row would remain: {heldout} rows are to be held out of {rows}."
        raise UserError(what, name, "Set `data.heldout` to a smaller number, or to a file.")
    if rows < 2:
        what = "A single row can't be both trained on and measured with."
        raise UserError(what, name, "Add rows, or name other ones as `data.heldout`.")
    return heldout if isinstance(heldout, int) else max(1, min(60, rows // 10))


def _hashes(rows: datasets.Dataset) -> Any:
    """The column as an array; of a whole or sliced data set, not of picked rows."""
    return rows.data.column("hash").to_numpy()


# The cache


def _stored(
    source: Source, layout: str, encoding: str, bad_rows: str
) -> tuple[datasets.Dataset, ReadReport]:
    """The rows, with their hashes, from the cache; written first where they are not in it."""
    import numpy as np

    sums = [file_sha256(path) for path in source.files]
    suffixes = [path.suffix for path in source.files]  # they take part in the detection
    parts = [STORE_VERSION, sums, suffixes, layout, encoding, bad_rows]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    stem = cache_dir("data") / key
    arrow, told = stem.with_suffix(".arrow"), stem.with_suffix(".json")
    if found := _cached(arrow, told):
        rows, report = found
        for entry, path in zip(report.files, source.files, strict=True):
            entry["path"] = shown(str(path))  # equal content may have been read from elsewhere
        return rows, report
    report = _write(source, layout, encoding, bad_rows, arrow)
    if [file_sha256(path) for path in source.files] != sums:
        arrow.unlink()
        raise UserError("The data changed while it was read.", source.name, "Start again.")
    rows = _map(arrow)
    report.duplicates = len(rows) - len(np.unique(_hashes(rows)))
    write_json(told, asdict(report))
    return rows, report


def _cached(arrow: Path, told: Path) -> tuple[datasets.Dataset, ReadReport] | None:
    """What an earlier reading left, unless it is incomplete or damaged."""
    import pyarrow as pa

    if not told.is_file():  # written last
        return None
    try:
        rows, report = _map(arrow), ReadReport(**read_json(told))
    except (UserError, TypeError, ValueError, pa.ArrowException, OSError):
        return None
    return (rows, report) if len(rows) == report.rows_kept else None


def _map(arrow: Path) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_file(str(arrow))


# Reading


def _write(source: Source, layout: str, encoding: str, bad_rows: str, arrow: Path) -> ReadReport:
    """Reads the source into the file, or raises and leaves nothing."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [("row", pa.int64()), ("hash", pa.uint64()), ("messages", pa.list_(message))]
    )
    found = _layout(source, encoding) if layout == "auto" else cast(Layout, layout)
    files: list[FileInfo] = []
    report = ReadReport([], "", found, "", "")
    with staged(arrow) as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in _batches(_usable(_rows(source, encoding, files), found, report)):
                writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=schema))
        _judge(report, bad_rows, source.name)
    report.files = [asdict(info) | {"path": shown(str(info.path))} for info in files]
    report.container = ", ".join(dict.fromkeys(info.container for info in files))
    report.encoding = ", ".join(dict.fromkeys(info.encoding for info in files if info.encoding))
    sums = [info.sha256 for info in files]
    joined = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    report.sha256 = sums[0] if len(sums) == 1 else joined
    return report


def _rows(source: Source, encoding: str, files: list[FileInfo]) -> Iterator[_Row]:
    """The rows of all files, numbered through; notes each file that was opened in `files`."""
    number = 0
    for path in source.files:
        info, rows = read_rows(path, encoding)
        files.append(info)
        prefix = f"{shown(path.name)} " if len(source.files) > 1 else ""
        for row in rows:
            number += 1
            place = f"line {row.line}" if row.line else f"row {row.number}"
            yield number, prefix + place, row.value


def _layout(source: Source, encoding: str) -> Layout:
    """The layout most of the first readable rows have."""
    values = (value for *_, value in _rows(source, encoding, []) if isinstance(value, dict))
    first = next(values, None)
    if first is None:
        return "messages"  # any will do: reading tells what is broken
    looked_at = itertools.chain([first], itertools.islice(values, _ROWS_LOOKED_AT - 1))
    seen = Counter(layout for value in looked_at if (layout := formats.detect(value)))
    if seen:
        return seen.most_common(1)[0][0]
    keys = ", ".join(f"`{shown(str(key))[:40]}`" for key in list(first)[:10])
    raise UserError(
        f"The rows have no known layout; the first one has {keys or 'no fields'}.",
        source.name,
        "Name the fields `instruction` and `output` (or `prompt` and `response`, `question` and "
        "`answer`), or give `conversations` (ShareGPT) or `messages` (OpenAI).",
    )


def _usable(rows: Iterator[_Row], layout: Layout, report: ReadReport) -> Iterator[_Kept]:
    """The rows as messages; those that can't be used go into the report."""
    for number, place, value in rows:
        report.rows_read += 1
        try:
            messages = _messages(value, layout)
        except RowError as error:
            report.drop(str(error), place)
        else:
            report.keep(messages)
            yield number, _hash(messages), messages


def _messages(value: dict[str, Any] | Broken, layout: Layout) -> list[Message]:
    if isinstance(value, Broken):
        raise RowError(value.reason)
    try:
        return formats.normalise(value, layout)
    except RowError:
        other = formats.detect(value)
        if other and other != layout:
            raise RowError(f"laid out as `{other}` among rows of `{layout}`") from None
        raise


def _hash(messages: list[Message]) -> int:
    text = json.dumps(messages, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _batches(rows: Iterator[_Kept]) -> Iterator[list[_Kept]]:
    """Groups small enough for the memory, be the rows many or long."""
    batch: list[_Kept] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(message["content"]) for message in row[2])
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _judge(report: ReadReport, bad_rows: str, name: str) -> None:
    """Raises if rows are unusable and that is not to be overlooked, or if all are."""
    if report.rows_kept and (bad_rows == "skip" or not report.dropped):
        return
    unusable = report.rows_read - report.rows_kept
    listed = "".join(f"\n  - {_told(*dropped)}" for dropped in report.dropped.items())
    raise UserError(
        f"{unusable} of {report.rows_read} rows can't be used:{listed}",
        name,
        "Mend the rows, or leave them out with `--set data.bad_rows=skip`."
        if report.rows_kept
        else "Mend the rows.",
    )


def _told(reason: str, entry: dict[str, Any]) -> str:
    places = [*entry["where"], *["…"] * (entry["count"] > len(entry["where"]))]
    return f"{reason}: {entry['count']} ({', '.join(places)})"
