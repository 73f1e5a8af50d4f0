"""Data files for tests: rows, and how they are written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from jetson_ft.data import encodings
from jetson_ft.data.formats import RowError
from jetson_ft.data.readers import NumberedRow, read_rows

ROWS = [
    {"instruction": "输入三支篮球队的名称。", "output": "雷霆，公牛和网队：各显神通！"},
    {"instruction": "什么是的一是不了在人有我？", "output": "他说：“这是中国的大学。”"},
]
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextmanager
def block_bytes(size: int) -> Iterator[None]:
    """Read files in blocks of `size` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "BLOCK_BYTES", size)
        yield


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path, encoding: str = "auto") -> list[Any]:
    return [row.value for row in read_rows(path, encoding)[1]]


def located(path: Path) -> list[tuple[int | None, Any]]:
    """Line and value of each row; of a malformed one, the reason."""
    return [(row.line, reason(row) or row.value) for row in read_rows(path)[1]]


def reason(row: NumberedRow) -> str:
    return str(row.value.reason) if isinstance(row.value, RowError) else ""


def as_json(rows: Any, **options: Any) -> str:
    return json.dumps(rows, ensure_ascii=False, **options)


def as_jsonl(rows: list[Any]) -> str:
    return "".join(as_json(row) + "\n" for row in rows)


def as_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
