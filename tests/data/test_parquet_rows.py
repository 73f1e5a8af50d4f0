"""Parquet: whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from row_files import ROWS, values, write

from jetson_ft.data.formats import RowError
from jetson_ft.data.layouts import to_conversation
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


def calling(name: str, as_text: bool = False, **arguments: str | None) -> dict[str, Any]:
    """A row with a call of the tool `name`, which has these arguments."""
    parameters = {"properties": {key: {"type": "string"} for key in arguments}}
    given = json.dumps(arguments) if as_text else arguments
    call = {"function": {"name": name, "arguments": given}}
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"name": name, "parameters": parameters}],
    }


def test_parquet_calls_and_tools_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    table = [calling("weather", city="Paris"), calling("add", first="1", second="2")]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    rows = values(tmp_path / "a.parquet")
    assert len(rows) == 2
    for row, given in zip(rows, table, strict=True):
        assert to_conversation(row, "messages") == to_conversation(given, "messages")


def test_parquet_function_call_in_a_struct_has_no_fields_of_other_rows(tmp_path: Path) -> None:
    table = [
        {"conversations": [
            {"from": "human", "value": {"name": "q"}},
            {"from": "function_call", "value": {"name": "f", "arguments": {key: "1"}}},
        ]}
        for key in "ab"
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == table


def test_null_in_a_parquet_list_or_in_json_text_is_kept(tmp_path: Path) -> None:
    row = calling("f", as_text=True, city=None) | {"history": [["q", None]], "system": None}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (value,) = values(tmp_path / "a.parquet")
    assert (value["history"], value["system"]) == ([["q", None]], None)
    (_user, call) = to_conversation({"messages": value["messages"]}, "messages").messages
    assert json.loads(call["tool_calls"])[0]["function"]["arguments"] == {"city": None}
