"""JSON and JSON Lines: line numbers, and what follows damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import as_json, block_bytes, located, quick, values, write

from jetson_ft.data.formats import RowError


def test_object_with_messages_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    assert values(write(tmp_path, "a.json", as_json(row, indent=1))) == [row]


@quick
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
            max_size=3,
        )
        | st.integers()
        | st.floats(allow_nan=False)
        | st.none(),
        min_size=1,
        max_size=6,
    ),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_array_gives_the_values_of_json_loads(
    tmp_path: Path, rows: list[Any], block: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path, "a.json", text.encode("utf-8", "replace"))
    with block_bytes(block):
        result = values(path, "utf-8")
    expected = json.loads(path.read_text("utf-8"))
    assert [row if isinstance(row, dict) else None for row in expected] == [
        None if isinstance(row, RowError) else row for row in result
    ]


def test_array_rows_have_the_line_they_start_on(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '\n[\n{"a":\n1},\n\n{"b": 2}, {"c":\n3}\n]')
    assert located(path) == [(3, {"a": 1}), (6, {"b": 2}), (6, {"c": 3})]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[{"a": 1},\n{"a": 2', 2, "cut off"),
        ('[{"a": 1},\n{"a": "x', 2, "cut off"),
        ('[{"a": 1}\n', 2, "cut off"),
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', 2, "not valid JSON (Expecting ':' delimiter)"),
        ('[{"a": 1}\n{"a": 2}]', 2, "not valid JSON (`,` or `]` is missing)"),
        ('[{"a": 1}\n]\nmore', 3, "text after the end of the JSON"),
        ('{"x": [{"a": 1}],\n"y": [{}]}', 2, "a second list of rows, `y`, besides `x`"),
        ('[{"a": 1},\n' + "[" * 200_000, 2, "not valid JSON (nested too deeply)"),
        ('[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", 2, "not valid JSON (a number too long)"),
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_malformed_array_ends_with_one_malformed_row(
    tmp_path: Path, text: str, line: int, reason: str, block: int
) -> None:
    path = write(tmp_path, "a.json", text)
    with block_bytes(block):
        first, last = located(path)
    assert first == (1, {"a": 1})
    assert last == (line, f"{reason}; nothing from here on can be read")


def test_malformed_lines_do_not_end_the_reading(tmp_path: Path) -> None:
    lines = ['{"a": 1}', '{"a": 2', "", "null", '{"a": 5}', "[1]", '{"a": "cut o']
    assert located(write(tmp_path, "a.jsonl", "\n".join(lines))) == [
        (1, {"a": 1}),
        (2, "not valid JSON (Expecting ',' delimiter)"),
        (4, "null instead of a row"),
        (5, {"a": 5}),
        (6, "not an object"),
        (7, "not valid JSON (Unterminated string starting at)"),
    ]
