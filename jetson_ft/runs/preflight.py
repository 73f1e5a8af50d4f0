"""What can be seen at a glance to be wrong with a job, before a run's folder is made for it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import cast

from jetson_ft.data import formats, read, store
from jetson_ft.data.formats import Layout, RowError
from jetson_ft.models import resolve
from jetson_ft.recipe import Recipe

_ROWS_LOOKED_AT = 100


def check(recipe: Recipe) -> None:
    """Looks for the model and the data, and into the first rows.

    Of a model on the hub only the small files are fetched; a data set on the hub is.

    Raises:
        UserError: the run would fail at its start.
    """
    if recipe.model != "embedded":
        resolve.resolve(recipe.model, weights=Path(recipe.model).expanduser().exists())
    data = recipe.data
    if data.train != "bundled":
        _check_rows(data.train, data.format, data.encoding, data.bad_rows)
    if isinstance(data.heldout, str) and data.heldout not in ("auto", "bundled"):
        _check_rows(data.heldout, "auto", "auto", data.bad_rows)


def _check_rows(name: str, layout: str, encoding: str, bad_rows: str) -> None:
    source = read.resolve(name)
    if not _has_usable_row(source, layout, encoding):
        # Reading all of it knows what is wrong with the rows, and how to say so.
        store.read(source, layout=layout, encoding=encoding, bad_rows=bad_rows)


def _has_usable_row(source: read.Source, layout: str, encoding: str) -> bool:
    for path in source.files:
        _, rows = read.read_rows(path, encoding)
        if any(_is_usable(row.value, layout) for row in islice(rows, _ROWS_LOOKED_AT)):
            return True
    return False


def _is_usable(value: object, layout: str) -> bool:
    if not isinstance(value, dict):
        return False
    found = formats.detect(value) if layout == "auto" else cast(Layout, layout)
    try:
        return bool(found and formats.normalise(value, found))
    except RowError:
        return False
