"""The rows of several sources: shares, duplicates, the held-out split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.data import sources
from jetson_ft.data import split as splitting
from jetson_ft.data.sources import Source, resolve_source
from jetson_ft.errors import UserError
from jetson_ft.recipe import DataRecipe


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"问题{number}", "output": f"答案{number}"} | changes


def source(folder: Path, rows: list[Any], name: str = "a.jsonl") -> Source:
    (folder / name).write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return resolve_source(str(folder / name))


def stored(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content, "train": True, "tool_calls": ""}


def answers(rows: Any) -> list[str]:
    return [messages[-1]["content"] for messages in rows["messages"]]


def split(data: Source, heldout: int | str, **options: Any) -> Any:
    return splitting.split_rows(DataRecipe(train=data.name, heldout=heldout, **options))


def test_chosen_columns_are_read_in_heldout_rows_that_have_them(tmp_path: Path) -> None:
    data = source(tmp_path, [{"title": f"t{number}", "body": "b"} for number in range(3)])
    same = source(tmp_path, [{"title": "t9", "body": "b9"}], "same.jsonl")
    other = source(tmp_path, [row(9)], "other.jsonl")
    columns = {"question": "title", "answer": "body"}
    for heldout, answer in ((same.name, "b9"), (other.name, "答案9")):
        _train, held, _info = split(data, heldout, columns=columns)
        assert answers(held) == [answer]


@pytest.mark.parametrize(
    ("count", "heldout", "kept"),
    [(2, "auto", 1), (30, "auto", 3), (700, "auto", 60), (30, 7, 7), (2, 1, 1)],
)
def test_heldout_rows_are_taken_from_the_end(
    tmp_path: Path, count: int, heldout: int | str, kept: int
) -> None:
    data = source(tmp_path, [row(number) for number in range(count)])
    train, held, info = split(data, heldout)
    assert train["row"][:] == list(range(1, count - kept + 1))
    assert held["row"][:] == list(range(count - kept + 1, count + 1))
    assert train.column_names == held.column_names == ["row", "messages", "tools"]
    assert (info.train_rows, info.heldout_rows, info.left_out) == (count - kept, kept, 0)
    assert info.heldout == []


def test_training_row_in_the_heldout_set_is_left_out(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(9), row(2), row(9), row(3), row(9)])
    train, held, info = split(data, 1)
    assert train["row"][:] == [1, 3, 5]
    assert answers(held) == ["答案9"]
    assert (info.train_rows, info.left_out) == (3, 2)


def test_heldout_file_has_its_own_detection(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2)])
    messages = [{"role": "user", "content": "问题1"}, {"role": "assistant", "content": "答案1"}]
    text = json.dumps([{"messages": messages}], ensure_ascii=False)
    (tmp_path / "h.json").write_text(text, "utf-16")
    train, held, info = split(data, str(tmp_path / "h.json"), format="alpaca")
    assert train["row"][:] == [2]
    assert held["messages"][0] == [stored("user", "问题1"), stored("assistant", "答案1")]
    (part,) = info.heldout
    assert (part.read.layout, part.read.encoding) == ("messages", "utf-16")
    assert info.heldout_from == str(tmp_path / "h.json")


def test_bundled_rows_have_their_own_heldout_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = source(tmp_path, [row(1)], "train.jsonl").files[0]
    heldout = source(tmp_path, [row(2)], "heldout.jsonl").files[0]
    monkeypatch.setitem(sources.BUNDLED, "bundled", sources.BundledSet(train, heldout, 0))
    train_rows, held, _ = splitting.split_rows(DataRecipe())
    assert (answers(train_rows), answers(held)) == (["答案1"], ["答案2"])


@pytest.mark.parametrize(
    ("count", "heldout", "what"),
    [
        (1, "auto", "No training row is left: 1 of 1 rows"),
        (3, 3, "No training row is left: 3 of 3 rows"),
        (1, 1, "No training row is left"),
    ],
)
def test_too_few_rows_for_a_split_are_refused(
    tmp_path: Path, count: int, heldout: int | str, what: str
) -> None:
    data = source(tmp_path, [row(number) for number in range(count)])
    with pytest.raises(UserError, match=what):
        split(data, heldout)


def test_heldout_set_equal_to_the_training_set_is_refused(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2)])
    with pytest.raises(UserError, match="every one is in the held-out set"):
        split(data, data.name)


def test_heldout_file_of_unknown_encoding_is_refused_with_a_fix_for_it(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2)])
    text = json.dumps({"instruction": "Größe", "output": "für"}, ensure_ascii=False)
    (tmp_path / "h.jsonl").write_text(text, "cp1252")
    with pytest.raises(UserError, match="can't be detected") as caught:
        split(data, str(tmp_path / "h.jsonl"), encoding="utf-8")
    assert str(caught.value.fix).startswith("Save the file as UTF-8. For the file of `data.train`,")
