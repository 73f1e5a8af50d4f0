"""JSON and JSON Lines: line numbers, and what follows damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import as_json, as_jsonl, block_bytes, located, quick, values, write

from jetson_ft.data.formats import RowError
from jetson_ft.data.readers import read_rows


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


def test_train_list_is_read_and_the_other_splits_are_named(tmp_path: Path) -> None:
    train, test = [{"a": 1}, {"a": 2}], [{"a": 3}]
    one, other = {"test": test}, {"test": test, "dev": [{}, {}]}
    for value, lists in (
        ({"train": train, **one}, {"test": 1}),
        ({**other, "train": train}, {"test": 1, "dev": 2}),
    ):
        for indent in (None, 1):
            info, rows = read_rows(write(tmp_path, "a.json", as_json(value, indent=indent)))
            with block_bytes(7):
                assert [row.value for row in rows] == train
            assert (info.key, info.unread_lists) == ("train", lists)


def test_only_list_of_an_object_is_read_whatever_its_name(tmp_path: Path) -> None:
    info, rows = read_rows(write(tmp_path, "a.json", as_json({"test": [{"a": 3}]})))
    assert ([row.value for row in rows], info.key) == ([{"a": 3}], "test")


@pytest.mark.parametrize(
    "value",
    [
        {"q": {"0": "x", "1": "y"}, "a": {"0": "v", "1": "w"}},
        {"q": ["x", "y"], "a": ["v", "w"]},
        {"0": {"q": "x", "a": "v"}, "1": {"q": "y", "a": "w"}},
        {"7": {"q": "x", "a": "v"}, "9": {"q": "y", "a": "w"}},
        {"q": {"7": "x", "9": "y"}, "a": {"7": "v", "9": "w"}},
        {"columns": ["q", "a"], "index": [7, 9], "data": [["x", "v"], ["y", "w"]]},
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_table_by_columns_is_read_as_rows(
    tmp_path: Path, value: Any, suffix: str, indent: int | None
) -> None:
    path = write(tmp_path, f"a.{suffix}", as_json(value, indent=indent))
    assert [value for _line, value in located(path)] == [{"q": "x", "a": "v"}, {"q": "y", "a": "w"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}]},
        {"history": [["q", "a"]], "instruction": "q", "output": "a"},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"chat": {"turn_1": {"Human": "q", "MOSS": "a"}}},
        {"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]},
        {"columns": [0], "data": [["a"]]},
        {"columns": [["q"]], "data": [["a"]]},
        {"columns": ["q", "q"], "data": [["a", "b"]]},
    ],
)
def test_one_row_with_lists_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    for suffix in ("json", "jsonl"):
        for indent in (None, 1):
            assert values(write(tmp_path, f"a.{suffix}", as_json(row, indent=indent))) == [row]


CONVERSATION = [{"role": "user", "content": "q"}, {"content": "a", "role": "assistant"}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt"])
def test_list_of_messages_is_a_row(tmp_path: Path, suffix: str) -> None:
    row = {"messages": CONVERSATION}
    one, two = as_json(CONVERSATION), as_jsonl([CONVERSATION] * 2)
    assert values(write(tmp_path, f"a.{suffix}", one)) == [row]
    assert located(write(tmp_path, f"b.{suffix}", two)) == [(1, row), (2, row)]
    for indent in (None, 1):
        array = as_json([CONVERSATION, CONVERSATION], indent=indent)
        assert values(write(tmp_path, f"c.{suffix}", array)) == [row, row]


def test_long_list_of_messages_is_a_row(tmp_path: Path) -> None:
    long = [CONVERSATION[0], {"role": "assistant", "content": "a" * 100_000}]
    path = write(tmp_path, "a.jsonl", as_jsonl([long, CONVERSATION]))
    assert values(path) == [{"messages": long}, {"messages": CONVERSATION}]


@pytest.mark.parametrize(
    "text",
    [
        '{\n "a": 1\n}\n{\n "a": 2\n}\n', '{"a": 1,\n"b": 2}\n{"a": 2}', '{"a": 1}{"a": 2}\n',
        '{"a": 1} {"a": 2}', "{\n" + '"b": "' + "x" * 70_000 + '"\n}',
    ],
)  # fmt: skip
def test_objects_over_several_lines_are_rows_in_a_jsonl_file(tmp_path: Path, text: str) -> None:
    info, rows = read_rows(write(tmp_path, "a.jsonl", text))
    assert info.container == "json"
    assert all(isinstance(row.value, dict) for row in rows)


def test_comments_are_refused_by_name(tmp_path: Path) -> None:
    reason = "not valid JSON (a comment, which JSON does not have)"
    text = '# rows\n{"a": 1}\n  // more\n{"a": 2}\n'
    rows = [(1, reason), (2, {"a": 1}), (3, reason), (4, {"a": 2})]
    assert located(write(tmp_path, "a.jsonl", text)) == rows
    rest = f"{reason}; nothing from here on can be read"
    assert located(write(tmp_path, "a.json", '// rows\n[{"a": 1}]')) == [(1, rest)]


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
