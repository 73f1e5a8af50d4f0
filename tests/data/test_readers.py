"""From any file to numbered rows: containers, limits, memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_files import ROWS, as_csv, as_json, as_jsonl, block_bytes, quick, values, write

from jetson_ft.data import encodings
from jetson_ft.data.formats import RowError
from jetson_ft.data.readers import read_rows
from jetson_ft.errors import UserError


@pytest.mark.parametrize(
    ("name", "text", "container", "key"),
    [
        ("a.json", as_json(ROWS), "json", ""),
        ("a.json", as_json(ROWS, indent=1), "json", ""),
        ("a.json", as_jsonl(ROWS), "jsonl", ""),
        ("a.jsonl", as_jsonl(ROWS), "jsonl", ""),
        ("a.jsonl", as_json(ROWS), "json", ""),
        ("a.csv", as_jsonl(ROWS), "jsonl", ""),
        ("a.json", as_json({"data": ROWS}), "json", "data"),
        ("a.json", as_json({"v": [1], "n": {}, "rows": ROWS, "end": 1}, indent=2), "json", "rows"),
        ("a.json", '{"data": [\n' + ",\n".join(map(as_json, ROWS)) + "\n]}", "json", "data"),
        ("a.json", "\n".join(as_json(row, indent=1) for row in ROWS), "json", ""),
        ("a.csv", as_csv(ROWS), "csv", ""),
        ("a.csv", as_csv(ROWS, ";"), "csv", ""),
        ("a.txt", as_csv(ROWS, "\t"), "csv", ""),
    ],
)
def test_text_container_is_detected_from_its_content(
    tmp_path: Path, name: str, text: str, container: str, key: str
) -> None:
    info, rows = read_rows(write(tmp_path, name, text))
    assert (info.container, info.key, info.encoding) == (container, key, "utf-8")
    assert [(row.number, row.value) for row in rows] == list(enumerate(ROWS, 1))


def test_jsonl_with_a_malformed_first_line_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"a": "x\n{"a": 2}\n{"a": 3}\n')
    info, rows = read_rows(path)
    assert info.container == "jsonl"
    assert [isinstance(row.value, RowError) for row in rows] == [True, False, False]


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff", "[]", "a,b\n", '{"data": []}x'])
def test_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, "a.csv", content)
    if content.startswith("{"):
        assert isinstance(values(path)[-1], RowError)
    else:
        with pytest.raises(UserError, match="0 rows"):
            values(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_row_over_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(encodings, "MAX_ROW_CHARACTERS", 1000)
    start = {"a.json": '[{"a": "', "a.jsonl": '{"a": "', "a.csv": "q,a\n1,"}[name]
    try:
        with block_bytes(100):
            rows = values(write(tmp_path, name, start + "x" * 5000))
    except UserError as error:
        assert "longer than" in str(error)
    else:
        assert "longer than" in str(rows[-1].reason)


@settings(quick, max_examples=150)
@example(content=b"\0\0\0\0\0\xd8\0\0", suffix="json", block=1 << 20, encoding="utf-16")
@given(
    content=st.binary(max_size=80)
    | st.tuples(
        st.sampled_from([b"[", b'{"', b'{"a":[{', b"PAR1", b"a,b\n", b"\xff\xfe", b"\xef\xbb\xbf"]),
        st.binary(max_size=40),
    ).map(b"".join)
    | st.text('[]{}",:\\u0d8 \n1e-', max_size=40).map(str.encode),
    suffix=st.sampled_from(["json", "jsonl", "csv", "parquet", "txt"]),
    block=st.sampled_from([1, 3, 1 << 20]),
    encoding=st.sampled_from(["auto", "utf-8", "gb18030", "utf-16", "big5", "utf-7"]),
)
def test_any_bytes_give_rows_or_a_user_error(
    tmp_path: Path, content: bytes, suffix: str, block: int, encoding: str
) -> None:
    path = write(tmp_path, f"a.{suffix}", content)
    try:
        with block_bytes(block):
            rows = values(path, encoding)
    except UserError as error:
        assert str(path) in str(error.where)
    else:
        assert rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_large_file_is_read_in_bounded_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    row = {"instruction": "问题" * 10, "output": "answer " * 60}
    text = as_csv([row]).split("\r\n")[1] if name == "a.csv" else as_json(row)
    joint, ends = (",\n", "[]") if name == "a.json" else ("\n", ["", ""])
    head = "instruction,output\n" if name == "a.csv" else ""
    path.write_text(head + ends[0] + joint.join([text] * 40_000) + ends[1], "utf-8")
    assert path.stat().st_size > 15 << 20
    rows = read_rows(path)[1]
    tracemalloc.start()
    count = sum(raw.value == row for raw in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 12 << 20


def test_large_row_takes_a_few_times_its_size(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", as_json([{"a": "汉" * 5_000_000}, {"a": "b"}]))
    rows = read_rows(path)[1]
    tracemalloc.start()
    assert [len(row.value["a"]) for row in rows if isinstance(row.value, dict)] == [5_000_000, 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size
