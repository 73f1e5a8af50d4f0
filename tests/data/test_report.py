"""The report of reading: what is left out with which fix, and what is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from row_files import as_jsonl, write

from jetson_ft.data import store
from jetson_ft.data.report import ReadReport
from jetson_ft.data.sources import resolve_source
from jetson_ft.errors import UserError


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"问题{number}", "output": f"答案{number}"} | changes


def read(folder: Path, rows: list[Any], name: str = "a.jsonl") -> ReadReport:
    path = write(folder, name, as_jsonl(rows))
    return store.read_source(resolve_source(str(path)))[1]


def test_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    one = row(1, metadata={"x": 1}, input="nan")
    report = read(tmp_path, [one, row(2, metadata="y"), row(3, metadata=None, **{"": 3})])
    assert report.unread == {"input: nan": 1, "metadata": 2, '""': 1}


def test_rows_of_other_splits_in_the_file_are_counted_as_not_read(tmp_path: Path) -> None:
    splits = {"train": [row(1)], "test": [row(2), row(3)]}
    report = read(tmp_path, [splits], "a.json")
    assert (report.rows_kept, report.unread) == (1, {"test[]": 2})


def test_report_keeps_a_bounded_number_of_names_and_reasons(tmp_path: Path) -> None:
    rows = [row(number, **{f"column {number}" + "x" * 90: 1}) for number in range(150)]
    bad = [{"conversations": [{"from": f"role {number}", "value": "q"}]} for number in range(80)]
    report = read(tmp_path, rows)
    assert len(report.unread) == 101 and report.unread["…"] == 50
    assert all(len(name) <= 40 for name in report.unread)
    with pytest.raises(UserError, match=r"other reasons: 30 \(line 51, ") as caught:
        read(tmp_path, bad)
    assert "- unknown role `role 0`: 1 (line 1)\n" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "fix"),
    [
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], "data.columns.answer=chosen"),
        ([{"messages": [], "rejected": "b"}], "data.columns.messages=chosen"),
        ([row(1, output=["a", "b"])], "a row for each answer"),
    ],
)
def test_rows_of_another_purpose_are_refused_with_a_fix_for_them(
    tmp_path: Path, rows: list[Any], fix: str
) -> None:
    with pytest.raises(UserError, match="1 of 1 rows can't be used") as caught:
        read(tmp_path, rows)
    assert fix in str(caught.value.fix)
    assert "Fix the rows" not in str(caught.value.fix)
