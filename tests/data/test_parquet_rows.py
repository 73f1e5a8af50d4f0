"""Parquet: whole and damaged."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from row_files import ROWS, values, write

from jetson_ft.data.formats import RowError
from jetson_ft.data.readers import NumberedRow, read_rows


def test_parquet_is_detected_whatever_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.json"  # the suffix does not matter
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    info, rows = read_rows(path)
    assert (info.container, info.size) == ("parquet", path.stat().st_size)
    assert list(rows) == [NumberedRow(number, None, row) for number, row in enumerate(ROWS, 1)]


def test_damaged_parquet_ends_with_a_malformed_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    (broken,) = values(write(tmp_path, "a.parquet", path.read_bytes()[:-20]))
    assert isinstance(broken, RowError) and "damaged Parquet" in str(broken.reason)
