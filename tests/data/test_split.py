"""The rows of several sources: shares, duplicates, the held-out split."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft.data import sources, store
from jetson_ft.data import split as splitting
from jetson_ft.data.readers import read_rows
from jetson_ft.data.sources import Source, resolve_source
from jetson_ft.errors import UserError
from jetson_ft.recipe import DataRecipe, SourceRecipe


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


def test_heldout_settings_read_the_first_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path, [{"title": "t", "body": "b"}])
    opened: list[Path] = []
    monkeypatch.setattr(
        store, "read_rows", lambda path, encoding: (opened.append(path), read_rows(path))[1]
    )
    columns = {"question": "title", "answer": "body"}
    chosen = DataRecipe.model_validate({"columns": columns, "format": "alpaca"})
    assert store.heldout_settings(data, chosen) == ("alpaca", columns)
    assert opened == list(data.files)


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
    assert train.column_names == held.column_names == ["row", "messages", "tools", "category"]
    assert info.left_out == 0
    assert info.heldout == []


def test_training_row_in_the_heldout_set_is_left_out(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(9), row(2), row(9), row(3), row(9)])
    train, held, info = split(data, 1)
    assert train["row"][:] == [1, 3, 5]
    assert answers(held) == ["答案9"]
    assert info.left_out == 2


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


@pytest.mark.parametrize(
    ("layout", "answer"),
    [("alpaca", "答案9"), ("messages", "m9"), ("sharegpt", "s9"), ("text", "t9"), ("auto", "m9")],
)
def test_heldout_rows_of_several_layouts_have_that_of_the_training_rows(
    tmp_path: Path, layout: str, answer: str
) -> None:
    def several(number: int) -> dict[str, Any]:
        texts = [f"m{number}", f"s{number}"]
        messages, turns = (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
            for text in texts
        )
        return row(number, messages=messages, conversations=turns, text=f"t{number}")

    data = source(tmp_path, [several(1)])
    heldout = source(tmp_path, [several(9)], "heldout.jsonl")
    _train, held, info = split(data, heldout.name, format=layout)
    assert answers(held) == [answer]
    assert info.heldout[0].read.layout == info.sources[0].read.layout


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


# Several sources


def several(folder: Path, *counts: int, first: int = 0) -> list[str]:
    """Write a file for each count; no row is in two of them."""
    names = []
    for number, count in enumerate(counts):
        rows = [row(first + 1000 * number + index) for index in range(count)]
        names.append(source(folder, rows, f"s{number}.jsonl").name)
    return names


def test_list_of_one_source_is_split_like_its_name(tmp_path: Path) -> None:
    (name,) = several(tmp_path, 30)
    one, listed = (splitting.split_rows(DataRecipe(train=train)) for train in (name, [name]))
    assert [rows[:] for rows in one[:2]] == [rows[:] for rows in listed[:2]]
    assert one[2] == listed[2]


def test_heldout_rows_come_from_each_source_in_proportion(tmp_path: Path) -> None:
    names = several(tmp_path, 60, 30, 10)
    train, held, info = splitting.split_rows(DataRecipe(train=names))
    assert [part.heldout_rows for part in info.sources] == [6, 3, 1]
    assert [part.rows for part in info.sources] == [54, 27, 9]
    assert info.heldout_from == ", ".join(f"the end of {name}" for name in names)
    assert (len(train), len(held)) == (90, 10)
    assert not set(answers(train)) & set(answers(held))
    numbers = [*train["row"][:], *held["row"][:]]
    assert sorted(numbers) == list(range(1, 101))  # through all sources
    _train, held, _info = splitting.split_rows(DataRecipe(train=names, heldout=20))
    assert len(held) == 20


def test_shares_and_row_limits_are_taken_from_their_source_alone(tmp_path: Path) -> None:
    one, two, three = several(tmp_path, 40, 40, 5)
    shared, limited = SourceRecipe(source=one, share=0.25), SourceRecipe(source=two, rows=7)
    data = DataRecipe(train=[shared, limited, SourceRecipe(source=three, rows=99)], heldout=1)
    train, held, info = splitting.split_rows(data)
    assert [part.rows + part.heldout_rows for part in info.sources] == [10, 7, 5]
    assert splitting.split_rows(data)[0][:] == train[:]
    more = data.model_copy(update={"train": [shared.model_copy(update={"share": 0.5})]})
    larger, larger_held, _info = splitting.split_rows(more)
    own = {answer for answer in answers(train) + answers(held) if int(answer[2:]) < 1000}
    assert len(own) == 10 and own < {*answers(larger), *answers(larger_held)}


def test_row_that_is_in_an_earlier_source_too_is_left_out_and_counted(tmp_path: Path) -> None:
    one = source(tmp_path, [row(2), row(2), row(1)], "one.jsonl").name
    two = source(tmp_path, [row(3), row(2), row(4)], "two.jsonl").name
    train, held, info = splitting.split_rows(DataRecipe(train=[one, two], heldout=1))
    assert sorted(answers(train) + answers(held)) == [f"答案{n}" for n in (1, 2, 2, 3, 4)]
    assert [part.repeated for part in info.sources] == [0, 1]


def test_training_row_in_another_sources_heldout_rows_is_left_out(tmp_path: Path) -> None:
    names = several(tmp_path, 20, 20)
    held_row = source(tmp_path, [row(5)], "held.jsonl").name
    train, held, info = splitting.split_rows(DataRecipe(train=names, heldout=held_row))
    assert answers(held) == ["答案5"] and "答案5" not in answers(train)
    assert (info.left_out, [part.rows for part in info.sources]) == (1, [19, 20])
    assert held["row"][:] == [41]  # numbered after all training rows


def test_bundled_sources_in_a_list_have_their_own_heldout_sets(tmp_path: Path) -> None:
    (name,) = several(tmp_path, 30)
    limited = SourceRecipe(source="bundled-short", rows=50)
    _train, held, info = splitting.split_rows(DataRecipe(train=["bundled", name, limited]))
    assert [part.heldout_rows for part in info.sources] == [0, 3, 0]
    assert [part.heldout_rows for part in info.heldout] == [66, 100]
    assert len(held) == len(set(held["row"][:])) == 169


def test_chosen_columns_apply_to_the_sources_that_have_them(tmp_path: Path) -> None:
    posts = source(tmp_path, [{"title": f"t{n}", "body": f"b{n}"} for n in range(3)], "p.jsonl")
    texts = source(tmp_path, [{"title": "t", "content": f"c{n}"} for n in range(3)], "t.jsonl")
    usual = source(tmp_path, [row(1)], "u.jsonl")
    names = [posts.name, texts.name, usual.name]
    columns = {"question": "title", "answer": "body", "text": "content"}
    data = DataRecipe.model_validate({"train": names, "heldout": 1, "columns": columns})
    train, held, _info = splitting.split_rows(data)
    roles = [[message["role"] for message in messages] for messages in train["messages"]]
    assert roles.count(["text"]) + len(held) >= 3 and ["user", "assistant"] in roles
    assert "答案1" in answers(train) + answers(held)
    data = DataRecipe.model_validate({"train": names, "columns": {"answer": "bodi"}})
    with pytest.raises(UserError, match="no column `bodi`"):
        splitting.split_rows(data)


def test_format_and_encoding_apply_to_each_source(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        text = json.dumps(row(ord(name[0])) | {"messages": []}, ensure_ascii=False)
        (tmp_path / name).write_text(text, "utf-16-le")
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    data = DataRecipe(train=names, format="alpaca", encoding="utf-16-le")
    train, held, _info = splitting.split_rows(data)
    assert sorted(answers(train) + answers(held)) == ["答案97", "答案98"]


def test_place_of_a_row_names_its_source_where_there_are_several(tmp_path: Path) -> None:
    names = several(tmp_path, 5, 5)
    _train, _held, info = splitting.split_rows(DataRecipe(train=names, heldout=1))
    assert str(splitting.row_place(7, info.sources)) == f"{names[1]} row 2"
    assert str(splitting.row_place(5, info.sources)) == f"{names[0]} row 5"
    assert str(splitting.row_place(3, info.sources[:1])) == "row 3"


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_mixture_trains_on_no_heldout_row_and_counts_every_row(data: st.DataObject) -> None:
    number = st.integers(0, 30)
    with tempfile.TemporaryDirectory() as folder:
        items = []
        for index in range(data.draw(st.integers(1, 3))):
            rows = data.draw(st.lists(number, min_size=1, max_size=40))
            limit = data.draw(
                st.just({})
                | st.builds(lambda share: {"share": share}, st.floats(0.01, 1))
                | st.builds(lambda rows: {"rows": rows}, st.integers(1, 50))
            )
            name = source(Path(folder), [row(n) for n in rows], f"{index}.jsonl").name
            items.append(SourceRecipe(source=name, **limit))
        heldout = data.draw(st.sampled_from(["auto", 1, 3]))
        try:
            train, held, info = splitting.split_rows(DataRecipe(train=items, heldout=heldout))
        except UserError as error:
            assert "No training row is left" in str(error)
            return
    assert len(train) and len(held) and not set(answers(train)) & set(answers(held))
    numbers = [*train["row"][:], *held["row"][:]]
    assert len(set(numbers)) == len(numbers)
    for part, item in zip(info.sources, items, strict=True):
        count = part.read.rows_read
        limit = max(1, round(item.share * count)) if item.share else item.rows or count
        assert part.rows + part.heldout_rows + part.repeated <= min(count, limit)
    taken = sum(part.rows + part.heldout_rows for part in info.sources)
    assert taken == len(train) + len(held)


# Plain text


def test_end_of_the_only_document_is_held_out(tmp_path: Path) -> None:
    lines = [f"第{number}行。\n" for number in range(100)]
    (tmp_path / "book.txt").write_text("".join(lines), "utf-8")
    train, held, info = splitting.split_rows(DataRecipe(train=str(tmp_path / "book.txt")))
    (first,), (last,) = answers(train), answers(held)
    assert first + last == "".join(lines) and last.startswith("第")
    assert 0.05 < len(last) / len(first + last) < 0.15
    assert [(part.rows, part.heldout_rows) for part in info.sources] == [(1, 1)]


def test_documents_are_held_out_whole(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    names = [str(tmp_path / f"{name}.txt") for name in "abc"]
    train, held, _info = splitting.split_rows(DataRecipe(train=names))
    assert (len(train), len(held)) == (2, 1)


def test_heldout_file_of_text_is_read_as_text(tmp_path: Path) -> None:
    rows = [{"title": "t", "content": f"文{n}"} for n in range(3)]
    names = [source(tmp_path, rows[:2]).name, source(tmp_path, rows[2:], "h.jsonl").name]
    for options in ({"format": "text"}, {"columns": {"text": "content"}}):
        data = DataRecipe.model_validate({"train": names[0], "heldout": names[1], **options})
        assert answers(splitting.split_rows(data)[1]) == ["文2"]
    data = DataRecipe.model_validate({"train": names[0], "heldout": "bundled", "format": "text"})
    assert len(splitting.split_rows(data)[1]) == 66  # conversations, by their own layout
