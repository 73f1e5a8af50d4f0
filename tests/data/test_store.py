"""Rows on disk: what is kept and counted, the cache, and the held-out split."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.data import read as reading
from jetson_ft.data import store
from jetson_ft.data.read import Source, resolve
from jetson_ft.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"instruction": f"问题{number}", "output": f"答案{number}"} | changes


def source(folder: Path, rows: list[Any], name: str = "a.jsonl") -> Source:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    (folder / name).write_text("\n".join(lines), "utf-8")
    return resolve(str(folder / name))


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


def test_rows_and_report(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2), row(1)])
    rows, report = store.read(data)
    assert rows.column_names == ["row", "messages"]
    assert rows[1] == {
        "row": 2,
        "messages": [
            {"role": "user", "content": "问题2"},
            {"role": "assistant", "content": "答案2"},
        ],
    }
    sha256 = reading.file_sha256(data.files[0])
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
            }
        ],
        container="jsonl",
        layout="alpaca",
        encoding="utf-8",
        sha256=sha256,
        rows_read=3,
        rows_kept=3,
        duplicates=1,
        characters={"question": 9, "answer": 9},
    )


def test_unusable_rows_are_refused_with_their_lines(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="5 of 6 rows can't be used") as caught:
        store.read(source(tmp_path, BAD))
    assert "  - no answer: 1 (line 3)" in str(caught.value)
    assert "data.bad_rows=skip" in caught.value.fix
    assert [path.name for path in cache.iterdir()] == ["hashes"]


def test_unusable_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    rows, report = store.read(source(tmp_path, BAD), bad_rows="skip")
    assert rows["row"][:] == [1]
    assert (report.rows_read, report.rows_kept, report.empty_answers) == (6, 1, 1)
    assert report.dropped == DROPPED


def test_first_twenty_places_are_kept(tmp_path: Path) -> None:
    data = source(tmp_path, [row(0), *["{"] * 30])
    with pytest.raises(UserError, match=r"30 \(line 2, .*line 21, …\)"):
        store.read(data)


def test_no_usable_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 1 rows can't be used") as caught:
        store.read(source(tmp_path, ["{"]), bad_rows="skip")
    assert "skip" not in caught.value.fix


def test_unknown_layout_names_the_fields(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no known layout; the first one has `text`, `label`"):
        store.read(source(tmp_path, [{"text": "x", "label": 1}]))


def test_mixed_layouts_are_told(tmp_path: Path) -> None:
    other = {"messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(UserError, match="laid out as `messages` among rows of `alpaca`: 1"):
        store.read(source(tmp_path, [row(1), row(2), other]))


def test_named_layout_is_not_detected(tmp_path: Path) -> None:
    both = row(1, messages=[])
    rows, report = store.read(source(tmp_path, [both]), layout="alpaca")
    assert (len(rows), report.layout) == (1, "alpaca")


def test_several_files_are_numbered_through(tmp_path: Path) -> None:
    files = [source(tmp_path, [row(1), "{"], "a.jsonl"), source(tmp_path, [row(2)], "b.json")]
    data = Source("hub", "o/n", tuple(file.files[0] for file in files))
    rows, report = store.read(data, bad_rows="skip")
    assert rows["row"][:] == [1, 3]
    assert (report.container, len(report.files)) == ("jsonl, json", 2)
    assert [entry["where"] for entry in report.dropped.values()] == [["a.jsonl line 2"]]


def test_long_rows_do_not_share_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_BATCH_CHARACTERS", 10)
    rows, _ = store.read(source(tmp_path, [row(number) for number in range(5)]))
    assert answers(rows) == [f"答案{number}" for number in range(5)]


# The cache


def test_second_reading_maps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = source(tmp_path, [row(1), row(2)])
    rows, report = store.read(data)
    monkeypatch.setattr(store, "read_rows", lambda *given: pytest.fail("read again"))
    monkeypatch.setattr(reading, "sha256_file", lambda path: pytest.fail("hashed again"))
    again, same_report = store.read(data)
    assert again[:] == rows[:]
    assert same_report == report
    assert again.cache_files


def test_equal_content_elsewhere_is_reported_under_its_own_name(tmp_path: Path) -> None:
    store.read(source(tmp_path, [row(1)], "a.jsonl"))
    _, report = store.read(source(tmp_path, [row(1)], "b.jsonl"))
    assert report.files[0]["path"] == str(tmp_path / "b.jsonl")


def test_changed_content_is_read_again(tmp_path: Path) -> None:
    store.read(source(tmp_path, [row(1)]))
    rows, _ = store.read(source(tmp_path, [row(1), row(2)]))
    assert len(rows) == 2


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("keep", [0, 40])
def test_damaged_cache_is_written_anew(tmp_path: Path, cache: Path, suffix: str, keep: int) -> None:
    data = source(tmp_path, [row(1), row(2)])
    store.read(data)
    (file,) = cache.glob(f"*{suffix}")
    file.write_bytes(file.read_bytes()[:keep])
    assert answers(store.read(data)[0]) == ["答案1", "答案2"]


def test_full_disk_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path, [row(1)])
    reading.file_sha256(data.files[0])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        store.read(data)
    assert [path.name for path in cache.iterdir()] == ["hashes"]


def test_change_while_reading_is_noticed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path, [row(1)])
    judge = store._judge

    def change(*given: Any) -> None:
        judge(*given)
        source(tmp_path, [row(1), row(2)])

    monkeypatch.setattr(store, "_judge", change)
    with pytest.raises(UserError, match="changed while it was read"):
        store.read(data)
    assert not list(cache.glob("*.arrow"))


@pytest.mark.slow
def test_readings_at_once_do_not_disturb_each_other(tmp_path: Path, cache: Path) -> None:
    data = source(tmp_path, [row(number) for number in range(20_000)])
    code = (
        "import sys, datasets; from jetson_ft.data import read, store; "
        "data = read.resolve(sys.argv[1]); print('ready', flush=True); input(); "
        "print(len(store.read(data)[0]))"
    )
    command = [sys.executable, "-c", code, data.name]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin and other.stdout
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        assert len(store.read(data)[0]) == 20_000
        assert other.communicate()[0] == "20000\n"
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".arrow", ".json"]


def test_undecodable_names_do_no_harm(tmp_path: Path) -> None:
    name = os.fsdecode("数据.json".encode("gb18030"))
    _, report = store.read(source(tmp_path, [{"\ud800": [1]} | row(1)], name))
    assert report.files[0]["path"].endswith(".json")


# The split


@pytest.mark.parametrize(
    ("count", "heldout", "kept"),
    [(2, "auto", 1), (30, "auto", 3), (700, "auto", 60), (30, 7, 7), (2, 1, 1)],
)
def test_held_out_from_the_end(tmp_path: Path, count: int, heldout: int | str, kept: int) -> None:
    data = source(tmp_path, [row(number) for number in range(count)])
    train, held, info = store.split(data, heldout)
    assert train["row"][:] == list(range(1, count - kept + 1))
    assert held["row"][:] == list(range(count - kept + 1, count + 1))
    assert train.column_names == held.column_names == ["row", "messages"]
    assert (info.train_rows, info.heldout_rows, info.left_out) == (count - kept, kept, 0)
    assert info.heldout is None


def test_train_rows_in_the_held_out_set_are_left_out(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(9), row(2), row(9), row(3), row(9)])
    train, held, info = store.split(data, 1)
    assert train["row"][:] == [1, 3, 5]
    assert answers(held) == ["答案9"]
    assert (info.train_rows, info.left_out) == (3, 2)


def test_held_out_file_has_its_own_detection(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2)])
    messages = [{"role": "user", "content": "问题1"}, {"role": "assistant", "content": "答案1"}]
    text = json.dumps([{"messages": messages}], ensure_ascii=False)
    (tmp_path / "h.json").write_text(text, "utf-16")
    train, held, info = store.split(data, str(tmp_path / "h.json"), layout="alpaca")
    assert train["row"][:] == [2]
    assert held["messages"][0] == messages
    assert info.heldout is not None
    assert (info.heldout.layout, info.heldout.encoding) == ("messages", "utf-16")
    assert info.heldout_from == str(tmp_path / "h.json")


def test_bundled_rows_have_their_own_held_out_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = source(tmp_path, [row(1)], "train.jsonl").files[0]
    heldout = source(tmp_path, [row(2)], "heldout.jsonl").files[0]
    monkeypatch.setattr(reading, "bundled_train", lambda: train)
    monkeypatch.setattr(store, "bundled_heldout", lambda: heldout)
    learnt, held, _ = store.split(resolve("bundled"), "auto")
    assert (answers(learnt), answers(held)) == (["答案1"], ["答案2"])


@pytest.mark.parametrize(
    ("count", "heldout", "what"),
    [
        (1, "auto", "A single row"),
        (3, 3, "No training row would remain"),
        (1, 1, "No training row"),
    ],
)
def test_too_few_rows(tmp_path: Path, count: int, heldout: int | str, what: str) -> None:
    data = source(tmp_path, [row(number) for number in range(count)])
    with pytest.raises(UserError, match=what):
        store.split(data, heldout)


def test_held_out_set_may_not_be_the_training_set(tmp_path: Path) -> None:
    data = source(tmp_path, [row(1), row(2)])
    with pytest.raises(UserError, match="every one stands in the held-out set"):
        store.split(data, data.name)
