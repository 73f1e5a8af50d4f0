"""Rows on disk: what is kept and counted, and the cache."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jetson_ft import files
from jetson_ft.data import store
from jetson_ft.data.sources import Source, resolve_source
from jetson_ft.errors import Message, UserError


@pytest.fixture
def cache(cache_root: Path) -> Path:
    return cache_root / "data"


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"问题{number}", "output": f"答案{number}"} | changes


def source(folder: Path, rows: list[Any], name: str = "a.jsonl") -> Source:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / name).write_text("\n".join(lines), "utf-8")
    return resolve_source(str(folder / name))


def stored(role: str, content: str, train: bool = True, tool_calls: str = "") -> dict[str, Any]:
    return {"role": role, "content": content, "train": train, "tool_calls": tool_calls}


def answers(rows: Any) -> list[str]:
    return [messages[-1]["content"] for messages in rows["messages"]]


BAD = [
    row(1),
    '{"instruction"',
    row(3, output=""),
    "null",
    {"instruction": "x"},
    row(6, output=None),
]
DROPPED = {
    "not valid JSON (Expecting ':' delimiter)": {"count": 1, "where": ["line 2"]},
    "no answer": {"count": 1, "where": ["line 3"]},
    "null instead of a row": {"count": 1, "where": ["line 4"]},
    "field `output` missing": {"count": 1, "where": ["line 5"]},
    "`output` is null": {"count": 1, "where": ["line 6"]},
}


def test_usable_rows_are_kept_and_reported(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2), row(1)])
    rows, report = store.read_source(data)
    assert rows.column_names == ["row", "messages", "tools", "category"]
    messages = [stored("user", "问题2"), stored("assistant", "答案2")]
    assert rows[1] == {"row": 2, "messages": messages, "tools": "", "category": ""}
    sha256 = files.cached_sha256(data.files[0])
    size = data.files[0].stat().st_size
    assert report == store.ReadReport(
        files=[
            {
                "path": str(data.files[0]),
                "container": "jsonl",
                "encoding": "utf-8",
                "size": size,
                "sha256": sha256,
                "key": "",
                "compression": "",
                "unread_lists": {},
            }
        ],
        container="jsonl",
        layout="alpaca",
        encoding="utf-8",
        sha256=sha256,
        cache_key=report.cache_key,
        rows_read=3,
        rows_kept=3,
        duplicates=1,
        characters={"question": 9, "answer": 9},
    )


def test_unusable_rows_are_refused_with_their_lines(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="5 of 6 rows can't be used") as caught:
        store.read_source(source(tmp_path, BAD))
    assert "  - no answer: 1 (line 3)" in str(caught.value)
    assert "data.on_invalid=skip" in str(caught.value.fix)
    assert [path.name for path in cache.iterdir()] == ["hashes"]


def test_unusable_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    rows, report = store.read_source(source(tmp_path, BAD), on_invalid="skip")
    assert rows["row"][:] == [1]
    assert (report.rows_read, report.rows_kept, report.empty_answers) == (6, 1, 1)
    messages = [Message.from_json(entry.pop("message")) for entry in report.dropped.values()]
    places = [entry.pop("places") for entry in report.dropped.values()]
    assert [str(message) for message in messages] == list(report.dropped)
    assert messages[3] == Message("field `{key}` missing", {"key": "output"})
    assert report.dropped == DROPPED
    assert [[str(Message.from_json(place)) for place in listed] for listed in places] == [
        entry["where"] for entry in DROPPED.values()
    ]


def test_more_than_twenty_places_are_cut(tmp_path: Path) -> None:
    data = source(tmp_path, [row(0), *["{"] * 30])
    with pytest.raises(UserError, match=r"30 \(line 2, .*line 21, …\)"):
        store.read_source(data)


def test_source_without_usable_row_is_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 1 rows can't be used") as caught:
        store.read_source(source(tmp_path, ["{"]), on_invalid="skip")
    assert "skip" not in str(caught.value.fix)


def test_unknown_layout_is_refused_with_the_fields(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known layout; the first one has `text`, `label`"):
        store.read_source(source(tmp_path, [{"text": "x", "label": 1}]))


def test_what_messages_say_about_training_and_tools_is_stored(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 1},
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    data = source(tmp_path, [{"messages": turns, "tools": [tool]}])
    for rows in (store.read_source(data)[0], store.read_source(data)[0]):  # then from the cache
        messages = rows[0]["messages"]
        assert [message["train"] for message in messages] == [True] * 3 + [False] + [True] * 2
        assert json.loads(messages[1]["tool_calls"]) == [call]
        assert json.loads(rows[0]["tools"]) == [tool]


def test_conversations_that_differ_only_in_what_is_trained_on_are_duplicates(
    tmp_path: Path,
) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    turns = [user, answer, user]
    rows = [
        {"messages": [*turns, answer]},
        {"messages": [user, {**answer, "weight": 0}, user, answer]},
    ]
    assert store.read_source(source(tmp_path, rows))[1].duplicates == 1
    tools = [{"messages": [user, answer]}, {"messages": [user, answer], "tools": [{"name": "f"}]}]
    assert store.read_source(source(tmp_path, tools))[1].duplicates == 0


# Chosen columns


def test_chosen_columns_are_read_and_take_part_in_the_cache(tmp_path: Path) -> None:
    data = source(tmp_path, [{"instruction": "q", "output": "a", "title": "t", "body": "b"}])
    assert answers(store.read_source(data)[0]) == ["a"]
    rows, report = store.read_source(data, columns={"question": "title", "answer": "body"})
    assert [message["content"] for message in rows[0]["messages"]] == ["t", "b"]
    assert list(report.unread) == ["instruction", "output"]
    assert answers(store.read_source(data)[0]) == ["a"]


@pytest.mark.parametrize(
    ("name", "fix"), [("titel", "Did you mean `title`?"), ("zzz", "Name one of these columns.")]
)
def test_chosen_column_that_no_row_has_is_refused(tmp_path: Path, name: str, fix: str) -> None:
    data = source(tmp_path, [{"title": "t", "body": "b"}])
    for columns in ({"question": name, "answer": "body"}, {"system": name}):
        with pytest.raises(
            UserError, match=f"no column `{name}`; they have `title`, `body`"
        ) as caught:
            store.read_source(data, columns=columns)
        assert str(caught.value.where) == f"data.columns.{next(iter(columns))}"
        assert str(caught.value.fix) == fix


def test_row_of_another_layout_is_unusable(tmp_path: Path) -> None:
    other = {"messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(UserError, match="layout `messages` among rows of layout `alpaca`: 1"):
        store.read_source(source(tmp_path, [row(1), row(2), other]))


def test_set_layout_is_not_detected(tmp_path: Path) -> None:
    both = row(1, messages=[])
    rows, report = store.read_source(source(tmp_path, [both]), layout="alpaca")
    assert (len(rows), report.layout) == (1, "alpaca")


def _chinese(text: str) -> str:
    return text.replace("line {line}", "第 {line} 行")


def test_rows_of_several_files_are_numbered_through(tmp_path: Path) -> None:
    files = [source(tmp_path, [row(1), "{"], "a.jsonl"), source(tmp_path, [row(2)], "b.json")]
    data = Source("o/n", tuple(file.files[0] for file in files))
    rows, report = store.read_source(data, on_invalid="skip")
    assert rows["row"][:] == [1, 3]
    assert (report.container, len(report.files)) == ("jsonl, json", 2)
    (entry,) = report.dropped.values()
    assert entry["where"] == ["a.jsonl line 2"]
    assert Message.from_json(entry["places"][0]).format(_chinese) == "a.jsonl 第 2 行"


def test_long_rows_are_written_in_separate_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 10)
    rows, _ = store.read_source(source(tmp_path, [row(number) for number in range(5)]))
    assert answers(rows) == [f"答案{number}" for number in range(5)]


# The cache


def test_second_reading_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path, [row(1), row(2)])
    rows, report = store.read_source(data)
    monkeypatch.setattr(store, "read_rows", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(files, "sha256_file", lambda path: pytest.fail("hashed again"))
    again, same_report = store.read_source(data)
    assert again[:] == rows[:]
    assert same_report == report
    assert again.cache_files


def test_equal_content_elsewhere_is_reported_under_its_own_name(tmp_path: Path) -> None:
    store.read_source(source(tmp_path, [row(1)], "a.jsonl"))
    _, report = store.read_source(source(tmp_path, [row(1)], "b.jsonl"))
    assert report.files[0]["path"] == str(tmp_path / "b.jsonl")


def test_changed_content_is_read_again(tmp_path: Path) -> None:
    store.read_source(source(tmp_path, [row(1)]))
    rows, _ = store.read_source(source(tmp_path, [row(1), row(2)]))
    assert len(rows) == 2


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("keep", [0, 40])
def test_damaged_cache_is_written_again(
    tmp_path: Path, cache: Path, suffix: str, keep: int
) -> None:
    data = source(tmp_path, [row(1), row(2)])
    store.read_source(data)
    (file,) = cache.glob(f"*{suffix}")
    file.write_bytes(file.read_bytes()[:keep])
    assert answers(store.read_source(data)[0]) == ["答案1", "答案2"]


def test_full_disk_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path, [row(1)])
    files.cached_sha256(data.files[0])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        store.read_source(data)
    assert [path.name for path in cache.iterdir()] == ["hashes"]


def test_source_changed_while_reading_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path, [row(1)])
    check = store.check_dropped

    def change(*arguments: Any) -> None:
        check(*arguments)
        source(tmp_path, [row(1), row(2)])

    monkeypatch.setattr(store, "check_dropped", change)
    with pytest.raises(UserError, match="changed while it was read"):
        store.read_source(data)
    assert not list(cache.glob("*.arrow"))


@pytest.mark.slow
def test_two_processes_reading_at_once_give_the_same_rows(tmp_path: Path, cache: Path) -> None:
    data = source(tmp_path, [row(number) for number in range(20_000)])
    code = (
        "import sys, datasets; from jetson_ft.data import sources, store; "
        "data = sources.resolve_source(sys.argv[1]); print('ready', flush=True); input(); "
        "print(len(store.read_source(data)[0]))"
    )
    command = [sys.executable, "-c", code, data.name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        assert len(store.read_source(data)[0]) == 20_000
        assert other.communicate()[0] == "20000\n"
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".arrow", ".json"]


def test_file_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    name = os.fsdecode("数据.json".encode("gb18030"))
    _, report = store.read_source(source(tmp_path, [{"\ud800": [1]} | row(1)], name))
    assert report.files[0]["path"].endswith(".json")


def test_category_is_kept_where_it_is_a_short_text(tmp_path: Path, cache: Path) -> None:
    values: list[Any] = [" 算术 ", 7, None, "x" * 81, ["a"], "\ud800"]
    rows = [row(n, Category=value) for n, value in enumerate(values)]
    read, _report = store.read_source(source(tmp_path, rows))
    assert read["category"][:] == ["算术", "", "", "", "", ""]
    columns = {"question": "category", "answer": "output"}
    asked = [{"category": "几点？", "output": "三点。"}]
    read, _report = store.read_source(source(tmp_path, asked, "b.jsonl"), columns=columns)
    assert read["category"][:] == [""], "it is the question"
