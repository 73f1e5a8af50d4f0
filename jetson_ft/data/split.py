"""Rows of all sources of a recipe together: which are taken, and which are held out.

Rows are numbered through all sources, and then through the held-out sets, so that a number names
one row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jetson_ft.data import store
from jetson_ft.data.formats import TEXT
from jetson_ft.data.report import ReadReport
from jetson_ft.data.sources import BUNDLED, Source, resolve_source
from jetson_ft.errors import Message, UserError, _
from jetson_ft.recipe import DataRecipe, SourceRecipe

if TYPE_CHECKING:
    import datasets

# Fixed, so that runs with different `train.seed` train on the same rows. A larger share contains
# the rows of a smaller one.
_SAMPLE_SEED = 0
AUTO_HELDOUT = 60  # rows at most, and a tenth of all rows


@dataclass
class SourcePart:
    """A source's part in the rows of a run."""

    name: str
    read: ReadReport
    first: int  # the number before that of its first row
    repeated: int = 0  # rows that are in an earlier source too, and are left out
    rows: int = 0  # trained on
    heldout_rows: int = 0
    tokens: int = 0  # of the rows that are trained on


@dataclass(frozen=True)
class SplitInfo:
    """The result of `split_rows`, for reports."""

    sources: list[SourcePart]
    heldout: list[SourcePart]  # sources of held-out rows alone; the others are from `sources`
    heldout_from: str
    left_out: int  # training rows left out because they are in the held-out set too


@dataclass(frozen=True)
class TakenRows:
    """The rows that are taken from a source."""

    part: SourcePart
    all_rows: datasets.Dataset  # with their hashes
    indices: Any  # of those taken

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def hashes(self) -> Any:
        """The hashes of the rows taken."""
        return store.hashes(self.all_rows)[self.indices]

    def pick(self, which: Any) -> TakenRows:
        """Return some of the rows taken, by a slice or a mask."""
        return replace(self, indices=self.indices[which])


def row_place(number: int, parts: Sequence[SourcePart]) -> Message:
    """Return a row's place by its number; `parts` are in the order of their numbers."""
    part = parts[bisect_left([part.first for part in parts], number) - 1]
    row = Message(_("row {row}"), {"row": number - part.first})
    return Message("{file} {place}", {"file": part.name, "place": row}) if len(parts) > 1 else row


def read_training(data: DataRecipe) -> list[TakenRows]:
    """Return the rows to take from each source; none is in an earlier source too.

    Raises:
        UserError: as `store.read_source`, or no source has a chosen column.
    """
    import numpy as np

    items, chosen = data.sources(), data.columns.chosen()
    sources = [resolve_source(item.source) for item in items]
    columns: list[Mapping[str, str]] = [chosen]
    if len(items) > 1:
        columns = [store.columns_of(source, data.encoding, chosen) for source in sources]
        if chosen.keys() - set().union(*columns):
            columns[0] = chosen  # the reading reports the column that is missing
    result: list[TakenRows] = []
    earlier, first = np.empty(0, np.uint64), 0
    for item, source, names in zip(items, sources, columns, strict=True):
        rows, report = store.read_cached(source, data.format, data.encoding, data.on_invalid, names)
        taken = TakenRows(SourcePart(item.source, report, first), rows, _sample(len(rows), item))
        is_repeated = np.isin(taken.hashes, earlier)
        taken.part.repeated = int(is_repeated.sum())
        earlier = np.union1d(earlier, taken.hashes)
        result.append(taken.pick(~is_repeated))
        first += report.rows_read
    return result


def _sample(count: int, item: SourceRecipe) -> Any:
    """Return the indices of the rows to take, in the order of the source."""
    import numpy as np

    wanted = count if item.rows is None else min(item.rows, count)
    if item.share is not None:
        wanted = max(1, round(item.share * count))
    if wanted == count:
        return np.arange(count)
    return np.sort(np.random.default_rng(_SAMPLE_SEED).permutation(count)[:wanted])


def join_rows(taken: Sequence[TakenRows]) -> datasets.Dataset:
    """Return the rows taken from all sources, numbered through; memory-mapped."""
    import datasets

    pieces = []
    for source in taken:
        rows = source.all_rows
        if source.part.first:
            numbers = rows.data.column("row").to_numpy() + source.part.first
            rows = rows.remove_columns("row").add_column("row", numbers)
        columns = rows.select_columns(["row", "messages", "tools", "category"])
        pieces.append(columns.select(source.indices))
    return datasets.concatenate_datasets(pieces) if len(pieces) > 1 else pieces[0]


def split_rows(data: DataRecipe) -> tuple[datasets.Dataset, datasets.Dataset, SplitInfo]:
    """Return training and held-out rows; no conversation is in both.

    Raises:
        UserError: as `store.read_source`, or no training row is left.
    """
    import numpy as np

    taken = read_training(data)
    sets = _heldout_sets(data, taken)
    ends = _heldout_ends(data, taken)
    total = sum(map(len, taken))
    if data.heldout == "auto" and ends.sum() == total == 1:
        document = join_rows([rows for rows in taken if len(rows)])
        if document[0]["messages"][0]["role"] == TEXT:
            return _split_document(document, taken)
    if ends.sum() >= total:
        raise UserError(
            _("No training row is left: {heldout} of {rows} rows are to be held out."),
            data.train_names(),
            _("Add rows, or set `data.heldout` to a smaller number or a file."),
            heldout=int(ends.sum()),
            rows=total,
        )
    train = [rows.pick(slice(len(rows) - end)) for rows, end in zip(taken, ends, strict=True)]
    heldout = [
        rows.pick(slice(len(rows) - end, None))
        for rows, end in zip(taken, ends, strict=True)
        if end
    ]
    names = [f"the end of {rows.part.name}" for rows in heldout]
    heldout_hashes = np.concatenate([rows.hashes for rows in (*heldout, *sets)])
    kept = [rows.pick(~np.isin(rows.hashes, heldout_hashes)) for rows in train]
    for rows in (*heldout, *sets):
        rows.part.heldout_rows = len(rows)
    for rows in kept:
        rows.part.rows = len(rows)
    info = SplitInfo(
        sources=[rows.part for rows in taken],
        heldout=[rows.part for rows in sets],
        heldout_from=", ".join([*names, *(rows.part.name for rows in sets)]),
        left_out=sum(map(len, train)) - sum(map(len, kept)),
    )
    if not any(map(len, kept)):
        raise UserError(
            _("No training row is left: every one is in the held-out set too."),
            data.train_names(),
            _("Set `data.heldout` to other rows, or to fewer."),
        )
    return join_rows(kept), join_rows([*heldout, *sets]), info


def _heldout_sets(data: DataRecipe, taken: Sequence[TakenRows]) -> list[TakenRows]:
    """Return the held-out rows that are not part of the training sources."""
    import numpy as np

    names = [str(data.heldout)] if isinstance(data.heldout, str) else []
    if names == ["auto"]:
        names = [rows.part.name for rows in taken if rows.part.name in BUNDLED]
    first = sum(rows.part.read.rows_read for rows in taken)
    sets = []
    for name in dict.fromkeys(names):
        if name in BUNDLED:
            source = Source(f"{name} held-out rows", (BUNDLED[name].heldout,))
        else:
            source = resolve_source(name)
        layout, columns = store.heldout_settings(source, data)
        rows, report = store.read_cached(source, layout, "auto", data.on_invalid, columns)
        part = SourcePart(source.name, report, first)
        sets.append(TakenRows(part, rows, np.arange(len(rows))))
        first += report.rows_read
    return sets


def _heldout_ends(data: DataRecipe, taken: Sequence[TakenRows]) -> Any:
    """Return how many rows at the end of each source are held out, in proportion to all of them."""
    import numpy as np

    sizes = np.array([len(rows) for rows in taken])
    if isinstance(data.heldout, int):
        count = data.heldout
    elif data.heldout == "auto":
        is_bundled = np.array([rows.part.name in BUNDLED for rows in taken])
        sizes[is_bundled] = 0  # they have held-out sets of their own
        count = max(not is_bundled.any(), min(AUTO_HELDOUT, sizes.sum() // 10))
    else:
        count = 0
    exact = count * sizes / max(1, sizes.sum())
    ends = exact.astype(int)
    largest_rests = np.argsort(ends - exact, kind="stable")
    ends[largest_rests[: count - ends.sum()]] += 1
    return ends


def _split_document(
    document: datasets.Dataset, taken: Sequence[TakenRows]
) -> tuple[datasets.Dataset, datasets.Dataset, SplitInfo]:
    """Hold out the last tenth of the only document, from the start of a line if there is one."""
    from datasets import Dataset

    row = document[0]
    text = row["messages"][0]["content"]
    cut = len(text) * 9 // 10
    cut = text.rfind("\n", cut // 2, cut) + 1 or cut

    def part_of(content: str) -> Dataset:
        messages = [{**row["messages"][0], "content": content}]
        return Dataset.from_list([{**row, "messages": messages}], features=document.features)

    source = next(rows.part for rows in taken if len(rows))
    source.rows = source.heldout_rows = 1
    sources = [rows.part for rows in taken]
    info = SplitInfo(sources, [], f"the end of {source.name}", 0)
    return part_of(text[:cut]), part_of(text[cut:]), info
