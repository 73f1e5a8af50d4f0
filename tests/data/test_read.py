"""From bytes to numbered rows: containers, encodings, damage, and finding the files."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jetson_ft import hub
from jetson_ft.data import read
from jetson_ft.data.read import Broken, RawRow, read_rows, resolve
from jetson_ft.errors import UserError

ROWS = [
    {"instruction": "输入三支篮球队的名称。", "output": "雷霆，公牛和网队：各显神通！"},
    {"instruction": "什么是的一是不了在人有我？", "output": "他说：“这是中国的大学。”"},
]
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path, encoding: str = "auto") -> list[Any]:
    return [row.value for row in read_rows(path, encoding)[1]]


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


# Containers


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
def test_container_is_told_by_content(
    tmp_path: Path, name: str, text: str, container: str, key: str
) -> None:
    info, rows = read_rows(write(tmp_path, name, text))
    assert (info.container, info.key, info.encoding) == (container, key, "utf-8")
    assert [(row.number, row.value) for row in rows] == list(enumerate(ROWS, 1))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"  # the suffix does not matter
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    info, rows = read_rows(path)
    assert (info.container, info.size) == ("parquet", path.stat().st_size)
    assert list(rows) == [RawRow(number, None, row) for number, row in enumerate(ROWS, 1)]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    (broken,) = values(write(tmp_path, "a.parquet", path.read_bytes()[:-20]))
    assert isinstance(broken, Broken) and "damaged Parquet" in broken.reason


def test_single_object_of_messages_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    assert values(write(tmp_path, "a.json", as_json(row, indent=1))) == [row]


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff", "[]", "a,b\n", '{"data": []}x'])
def test_no_rows(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, "a.csv", content)
    if content.startswith("{"):
        assert isinstance(values(path)[-1], Broken)
    else:
        with pytest.raises(UserError, match="0 rows"):
            values(path)


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
def test_array_reader_equals_json_loads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    block: int,
    indent: int | None,
    ascii_only: bool,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path, "a.json", text.encode("utf-8", "replace"))
    monkeypatch.setattr(read, "BLOCK", block)
    expected = json.loads(path.read_text("utf-8"))
    got = values(path, "utf-8")
    assert [row if isinstance(row, dict) else None for row in expected] == [
        None if isinstance(row, Broken) else row for row in got
    ]


@quick
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                name: st.text(st.characters(exclude_characters="\0", codec="utf-8"))
                for name in ("q", "a")
            }
        ),
        min_size=1,
        max_size=5,
    ),
    delimiter=st.sampled_from(",;\t"),
    block=st.integers(1, 30),
)
def test_csv_round_trip(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, str]],
    delimiter: str,
    block: int,
) -> None:
    path = write(tmp_path, "a.csv", as_csv(rows, delimiter))
    monkeypatch.setattr(read, "BLOCK", block)
    assert values(path, "utf-8") == rows


# Lines and damage


def test_line_numbers_in_an_array(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '\n[\n{"a":\n1},\n\n{"b": 2}, {"c":\n3}\n]')
    assert [(row.line, row.value) for row in read_rows(path)[1]] == [
        (3, {"a": 1}),
        (6, {"b": 2}),
        (6, {"c": 3}),
    ]


def test_broken_jsonl_lines_do_not_end_the_reading(tmp_path: Path) -> None:
    lines = ['{"a": 1}', '{"a": 2', "", "null", '{"a": 5}', "[1]", '{"a": "cut o']
    rows = list(read_rows(write(tmp_path, "a.jsonl", "\n".join(lines)))[1])
    assert [row.line for row in rows] == [1, 2, 4, 5, 6, 7]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    reasons = [row.value.reason for row in rows if isinstance(row.value, Broken)]
    assert reasons == [
        "not valid JSON (Expecting ',' delimiter)",
        "null instead of a row",
        "not an object",
        "not valid JSON (Unterminated string starting at)",
    ]


def test_first_line_broken_is_still_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"a": "x\n{"a": 2}\n{"a": 3}\n')
    info, rows = read_rows(path)
    assert info.container == "jsonl"
    assert [isinstance(row.value, Broken) for row in rows] == [True, False, False]


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
def test_broken_array_ends_the_reading_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, reason: str, block: int
) -> None:
    path = write(tmp_path, "a.json", text)
    monkeypatch.setattr(read, "BLOCK", block)
    first, last = read_rows(path)[1]
    assert first.value == {"a": 1}
    assert last == RawRow(2, line, Broken(f"{reason}; nothing from here on can be read"))


def test_csv_keeps_text_and_shifts_nothing(tmp_path: Path) -> None:
    text = 'q;a;n\r\nNA;"two\nlines; here";007\r\n\r\n1;2\r\nx;y;z;w\r\n"null";true;""\r\n'
    rows = list(read_rows(write(tmp_path, "a.csv", text))[1])
    assert [(row.line, row.value) for row in rows] == [
        (2, {"q": "NA", "a": "two\nlines; here", "n": "007"}),
        (5, Broken("2 columns where the header has 3")),
        (6, Broken("4 columns where the header has 3")),
        (7, {"q": "null", "a": "true", "n": ""}),
    ]


def test_csv_quote_never_closed(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path, "a.csv", 'q,a\n1,2\n"3,4\n5,6\n'))[1])
    assert rows[1:] == [RawRow(2, 3, Broken("not valid CSV (unexpected end of data)"))]


def test_csv_header_must_name_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must name the columns") as caught:
        values(write(tmp_path, "a.csv", "\nq,q\n1,2\n"))
    assert "line 2" in caught.value.where


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_endless_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(read, "LONGEST_ROW", 1000)
    monkeypatch.setattr(read, "BLOCK", 100)
    start = {"a.json": '[{"a": "', "a.jsonl": '{"a": "', "a.csv": "q,a\n1,"}[name]
    try:
        rows = values(write(tmp_path, name, start + "x" * 5000))
    except UserError as error:
        assert "longer than" in str(error)
    else:
        assert "longer than" in rows[-1].reason


# Encodings


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
        ("gb18030", "gb18030"),
        ("gbk", "gb18030"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_encoding_is_told_and_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
    named: str,
    block: int,
    suffix: str,
) -> None:
    text = {"json": as_json(ROWS), "jsonl": as_jsonl(ROWS), "csv": as_csv(ROWS)}[suffix]
    monkeypatch.setattr(read, "BLOCK", block)
    info, rows = read_rows(write(tmp_path, f"a.{suffix}", text.encode(encoding)))
    assert info.encoding == named
    assert [row.value for row in rows] == ROWS


@quick
@given(
    text=st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "gbk", "gb18030", "utf-8-sig"]),
    block=st.integers(1, 9),
)
def test_named_encodings_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, encoding: str, block: int
) -> None:
    path = write(tmp_path, "a.jsonl", as_jsonl([{"a": text}]).encode(encoding))
    monkeypatch.setattr(read, "BLOCK", block)
    assert values(path, encoding) == [{"a": text}]


@quick
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=60),
    encoding=st.sampled_from(["utf-8", "utf-16", "gb18030"]),
    block=st.integers(1, 9),
    data=st.data(),
)
def test_bad_byte_is_located(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    encoding: str,
    block: int,
    data: st.DataObject,
) -> None:
    bad = {"utf-8": b"\xff", "utf-16": b"\x00\xdc", "gb18030": b"\xff"}[encoding]
    at = data.draw(st.integers(0, len(text)))
    before = text[:at].encode(encoding) or "".encode(encoding)
    after = text[at:].encode("utf-16-le" if encoding == "utf-16" else encoding)
    path = write(tmp_path, "a.txt", before + bad + after)
    monkeypatch.setattr(read, "BLOCK", block)
    with pytest.raises(UserError) as caught:
        "".join(read._text(path, encoding))
    line = text[:at].count("\n") + 1
    assert caught.value.where == f"{path}, line {line}, byte {len(before)} counted from 0"


def test_one_bad_byte_in_utf8_is_not_another_encoding(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode()
    at = content.index("公".encode(), 2000)
    line = content[:at].count(b"\n") + 1
    path = write(tmp_path, "a.jsonl", content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(UserError, match="is utf-8 text, but the byte 0xff") as caught:
        values(path)
    assert caught.value.where == f"{path}, line {line}, byte {at} counted from 0"


def test_one_bad_byte_in_gb18030(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode("gb18030") + b"\xff\n"
    with pytest.raises(UserError, match="is gb18030 text, but the byte 0xff") as caught:
        values(write(tmp_path, "a.jsonl", content))
    assert f"line 41, byte {len(content) - 2} " in caught.value.where


def test_gb18030_after_a_megabyte_of_ascii(tmp_path: Path) -> None:
    content = as_jsonl([{"a": "x" * 100}] * 12_000 + ROWS).encode("gb18030")
    info, rows = read_rows(write(tmp_path, "a.jsonl", content))
    assert info.encoding == "gb18030"
    assert list(rows)[-1].value == ROWS[-1]


@pytest.mark.parametrize(
    "content",
    [
        as_jsonl(ROWS).encode("gb18030") * 20 + as_jsonl(ROWS).encode(),  # mixed
        as_jsonl([{"a": "Größe für café déjà vu"}]).encode("cp1252"),
        as_jsonl([{"a": "안녕하세요 저는 한국 사람입니다"}] * 20).encode("euc-kr"),
        as_jsonl([{"a": "你好，我們今天去學校讀書"}]).encode("big5"),
        as_jsonl([{"a": "plain"}]).encode() + b"\xff\n",
        as_jsonl(ROWS).encode("utf-16-le"),  # without byte order mark
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    ],
)
def test_unclear_encodings_are_asked_about(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="can't be told") as caught:
        values(write(tmp_path, "a.jsonl", content))
    assert "data.encoding" in caught.value.fix


def test_mostly_utf8_with_rows_of_another_encoding_names_the_place(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode() + as_jsonl(ROWS).encode("gb18030")
    with pytest.raises(UserError, match="is utf-8 text, but") as caught:
        values(write(tmp_path, "a.jsonl", content))
    assert "line 41," in caught.value.where


@pytest.mark.parametrize("name", ["klingon", "rot13", "base64", "\0", "undefined", "punycode"])
def test_unknown_encoding(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no text encoding"):
        values(write(tmp_path, "a.jsonl", as_jsonl(ROWS)), name)


# Anything at all


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    suffix: str,
    block: int,
    encoding: str,
) -> None:
    path = write(tmp_path, f"a.{suffix}", content)
    monkeypatch.setattr(read, "BLOCK", block)
    try:
        rows = values(path, encoding)
    except UserError as error:
        assert str(path) in error.where
    else:
        assert rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_memory_stays_bounded(tmp_path: Path, name: str) -> None:
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


def test_a_large_row_takes_a_few_times_its_size(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", as_json([{"a": "汉" * 5_000_000}, {"a": "b"}]))
    rows = read_rows(path)[1]
    tracemalloc.start()
    assert [len(row.value["a"]) for row in rows if isinstance(row.value, dict)] == [5_000_000, 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * path.stat().st_size


# Names


def test_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a.json", "[1]")
    first = read.file_sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(read, "sha256_file", lambda path: pytest.fail("hashed again"))
        assert read.file_sha256(path) == first
    write(tmp_path, "a.json", "[1, 2]")
    assert read.file_sha256(path) != first


def test_bundled_and_file(tmp_path: Path) -> None:
    assert resolve("bundled").files == (read.bundled_train(),)
    path = write(tmp_path, "a.json", "[]")
    assert resolve(str(path)).files == (path,)


def test_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "train_zh.json", "[]")
    with pytest.raises(UserError, match="no such data file") as caught:
        resolve(str(tmp_path / "trian_zh.json"))
    assert f"Did you mean `{tmp_path / 'train_zh.json'}`?" in caught.value.fix


def test_folder_lists_its_data_files(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "")
    with pytest.raises(UserError, match="folder") as caught:
        resolve(str(tmp_path))
    assert "a.jsonl" in caught.value.fix


@pytest.mark.parametrize("name", ["no/such.json", "x" * 5000, "a\0b", "~nobody/x", "/no/x/y.csv"])
def test_unusable_names(name: str) -> None:
    with pytest.raises(UserError):
        resolve(name)


class Hub:
    """Stands in for the hub: a list of files, and a folder to fetch them into."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
        self.folder, self.fetched = folder, []
        monkeypatch.chdir(folder)
        monkeypatch.setattr(hub, "list_files", lambda repo, kind: files)
        monkeypatch.setattr(hub, "fetch", self.fetch)

    def fetch(self, repo: str, kind: str, patterns: list[str]) -> Path:
        assert kind == "dataset"
        self.fetched += patterns
        for pattern in patterns:
            (self.folder / pattern).parent.mkdir(parents=True, exist_ok=True)
            write(self.folder, pattern, as_json(ROWS))
        return self.folder


@pytest.mark.parametrize(
    ("files", "name", "chosen"),
    [
        (["README.md", "dataset_infos.json", "zh.json"], "o/n", ["zh.json"]),
        (["test.json", "train.json"], "o/n", ["train.json"]),
        (["constraints.json", "train.json"], "o/n", ["train.json"]),
        (
            ["d/train-00000-of-00002.parquet", "d/train-00001-of-00002.parquet", "d/test.parquet"],
            "o/n",
            ["d/train-00000-of-00002.parquet", "d/train-00001-of-00002.parquet"],
        ),
        (["a.json", "d/b.txt"], "o/n/d/b.txt", ["d/b.txt"]),
    ],
)
def test_hub_files_are_chosen(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    name: str,
    chosen: list[str],
) -> None:
    stand_in = Hub(tmp_path, monkeypatch, files)
    source = resolve(name)
    assert (source.kind, source.name) == ("hub", name)
    assert stand_in.fetched == chosen
    assert source.files == tuple(tmp_path / file for file in chosen)


@pytest.mark.parametrize(
    ("files", "name", "what"),
    [
        (["a.json", "b.json"], "o/n", "several files. There are: a.json, b.json"),
        (["README.md"], "o/n", "no file of a kind"),
        (["a.json"], "o/n/b.json", "No file 'b.json'. There are: a.json"),
        ([f"{number}.csv" for number in range(30)], "o/n", "and 10 more"),
    ],
)
def test_hub_choice_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], name: str, what: str
) -> None:
    Hub(tmp_path, monkeypatch, files)
    with pytest.raises(UserError, match=what):
        resolve(name)
