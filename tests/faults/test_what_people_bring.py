"""Data files and chat templates as people bring them, through the command line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from program import Done, assert_refused, main_here

from jetson_ft.data import encodings

MODEL = Path(__file__).parents[1] / "versions" / "1" / "model"
ROWS = [
    {"instruction": f"第{n}题：这是什么？", "output": f"这是一个的不了在人{n}。"} for n in range(9)
]
LINES = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def inspect(name: str, *options: str, samples: int = 0) -> Done:
    """Run `data inspect`."""
    return main_here("data", "inspect", name, "--model", MODEL, "--samples", samples, *options)


def dry_run(name: str, *settings: str) -> Done:
    """Run `train --dry-run` with the rows."""
    settings = f"data.train={name}", f"model={MODEL}", "data.heldout=2", *settings
    overrides = [word for setting in settings for word in ("--set", setting)]
    return main_here("train", "quickstart-zh", "--dry-run", *overrides)


def peak_bytes(field: str = "VmHWM") -> int:
    """Return the most memory that this process has had, or what it has (`VmRSS`)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


@contextmanager
def memory_within(limit: int) -> Iterator[None]:
    """Fail if this process takes more than `limit` bytes in between."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes("VmRSS")
    yield
    assert peak_bytes() - before < limit


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- archives ------------------------------------------------------------------------------------


def zipped(*members: tuple[str, str], unix_mode: int = 0o644) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = unix_mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


@pytest.mark.promise(26)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "content",
    [
        zipped(("../../up.jsonl", LINES[0])),
        zipped(("/tmp/absolute.jsonl", LINES[0])),
        zipped(("rows.jsonl", "/etc/passwd"), unix_mode=0o120777),  # a link
        zipped(("rows.jsonl", LINES[0]), ("rows.jsonl", LINES[1])),
        zipped(("a.jsonl", LINES[0]), ("A.jsonl", LINES[1])),
        zipped(("rows.zip", zipped(("rows.jsonl", LINES[0])).decode("latin-1"))),
    ],
    ids=["parent", "absolute", "link", "double", "case", "nested"],
)
def test_hostile_archive_writes_nothing_and_opens_nothing(folder: Path, content: bytes) -> None:
    (folder / "a.zip").write_bytes(content)
    done = inspect("a.zip", samples=9)
    assert "root:" not in done.stdout + done.stderr
    if done.returncode:
        assert_refused(done)
    else:  # the only file's rows, from where they are
        assert "rows:      1 read, 1 usable" in done.stdout
    assert files_in(folder) == ["a.zip"]
    assert not (folder.parent / "up.jsonl").exists() and not (folder / "../../up.jsonl").exists()
    assert not Path("/tmp/absolute.jsonl").exists()


@pytest.mark.promise(26)
@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"\xfd7zXZ\0\0", "an xz archive"), (b"BZh91AY&SY", "a bzip2 archive"),
        (b"\x28\xb5\x2f\xfd\0", "a zstd archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07\x01", "a RAR archive"), (b"a" * 257 + b"ustar\0", "a tar archive"),
    ],
)  # fmt: skip
def test_archive_of_another_kind_is_refused_by_name(folder: Path, start: bytes, word: str) -> None:
    (folder / "rows.jsonl").write_bytes(start + bytes(300))
    assert_refused(inspect("rows.jsonl"), word, "rows.jsonl")


@pytest.mark.promise(26)
@pytest.mark.parametrize("name", ["a.gz", "a.zip"])
@pytest.mark.parametrize("start", ['[{"instruction": "', "q,a\n"])
def test_bomb_is_refused_in_bounded_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: str
) -> None:
    monkeypatch.setattr(encodings, "MAX_ROW_CHARACTERS", 1 << 20)
    content = start + "a" * (40 << 20)
    inspect("bundled-short")  # the imports
    packed = gzip.compress(content.encode(), 1) if name == "a.gz" else zipped(("a.csv", content))
    (folder / name).write_bytes(packed)
    assert len(packed) < 1 << 20
    del content
    with memory_within(25 << 20):
        done = inspect(name)
    assert_refused(done)
    assert files_in(folder) == [name]


# --- encodings -----------------------------------------------------------------------------------


@pytest.mark.promise(29)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "encoding", ["gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8"]
)
def test_encoding_is_detected_and_named(folder: Path, name: str, encoding: str) -> None:
    text = "".join(LINES)
    if name == "rows.csv":
        text = "instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in ROWS)
    if name == "rows.json":
        text = json.dumps(ROWS, ensure_ascii=False)
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    content = (mark + text).encode(encoding)
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    done = inspect(name, samples=1)
    assert done.returncode == 0, done.stderr
    assert f", {encoding.removesuffix('-le').removesuffix('-be')}\n" in done.stdout
    assert "rows:      9 read, 9 usable" in done.stdout
    assert ROWS[0]["instruction"] in done.stdout and ROWS[0]["output"] in done.stdout


@pytest.mark.promise(29)
@pytest.mark.parametrize("encoding", ["euc-kr", "big5", "shift_jis", "utf-16-le", "cp1252"])
def test_encoding_that_is_not_clear_is_asked_for(folder: Path, encoding: str) -> None:
    texts = {
        "euc-kr": "안녕하세요 세계 여러분 ", "big5": "這是個測試資料與學習",
        "utf-16-le": "这是中文", "shift_jis": "これは日本語のテスト", "cp1252": "déjà vu à côté ",
    }  # fmt: skip
    row = {"instruction": texts[encoding] * 19, "output": texts[encoding]}
    content = json.dumps(row, ensure_ascii=False).encode(encoding)
    (folder / "rows.jsonl").write_bytes(content)
    assert_refused(inspect("rows.jsonl"), "can't be detected", "data.encoding", "rows.jsonl")
    done = inspect("rows.jsonl", "--encoding", encoding, samples=1)
    assert done.returncode == 0 and row["output"] in done.stdout


@pytest.mark.promise(30)
@pytest.mark.parametrize(
    ("bad", "byte"),
    [(b"\xff", "0xff"), ("\ud55c".encode("euc-kr"), "0xc7"), ("答".encode("gb18030"), "0xb4"),
     (b"\xed\xa0\x80", "0xed"), (b"\xe6\xb1", "0xe6")],
)  # fmt: skip
@pytest.mark.parametrize("setting", ["data.on_invalid=error", "data.on_invalid=skip"])
def test_bad_byte_is_named_with_its_line_and_nothing_is_replaced(
    folder: Path, bad: bytes, byte: str, setting: str
) -> None:
    before = "".join(LINES * 9).encode()
    start = b'{"instruction": "a'
    (folder / "rows.jsonl").write_bytes(before + start + bad + b'", "output": "b"}\n' + before)
    done = dry_run("rows.jsonl", setting)
    place = f"line 82, byte {len(before + start)} counted"
    assert_refused(done, byte, place, "rows.jsonl")
    assert_refused(inspect("rows.jsonl"), byte, place)


@pytest.mark.promise(30)
@pytest.mark.parametrize("damage", ["\ufffd", "\\ud83d", "\\ufffd"])
def test_replaced_characters_are_not_trained_on(folder: Path, damage: str) -> None:
    line = f'{{"instruction": "a{damage}", "output": "b"}}\n'
    (folder / "rows.jsonl").write_text("".join(LINES) + line, "utf-8")
    assert_refused(dry_run("rows.jsonl"), "damaged text", "line 10")
    assert "9 usable" in inspect("rows.jsonl").stdout


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.promise(31)
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", [LINES[0], '{"instruction": \n', "x\n", *LINES[1:]], ["line 2", "line 3"]),
        ("rows.jsonl", [*LINES, LINES[0][:-9]], ["line 10"]),
        ("rows.jsonl", [*LINES, "[" * 99_999 + "\n"], ["line 10", "nested too deeply"]),
        ("rows.jsonl", [*LINES, f'{{"instruction": {"9" * 5000}}}\n'], ["a number too long"]),
        ("rows.json", ["[\n", ",".join(LINES)[:-9]], ["line 10", "cut off"]),
        ("rows.json", ["[\n", ",".join([*LINES, "x", *LINES]), "]"], ["line 11"]),
    ],
    ids=["lines", "cut line", "deep", "number", "cut list", "broken list"],
)
def test_broken_json_is_refused_with_its_lines_unless_to_be_skipped(
    folder: Path, name: str, content: list[str], words: list[str]
) -> None:
    (folder / name).write_text("".join(content), "utf-8")
    assert_refused(dry_run(name), "can't be used", name, *words)
    done = dry_run(name, "data.on_invalid=skip")
    assert done.returncode == 0, done.stderr
    shown = inspect(name).stdout
    assert all(word in shown for word in words), shown


@pytest.mark.promise(32)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.gz", "a.zip"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]"])
def test_empty_file_has_no_rows(folder: Path, name: str, content: bytes) -> None:
    if name == "a.gz":
        content = gzip.compress(content)
    if name == "a.zip":
        content = zipped(("a.json", content.decode()))
    if (name, content) == ("a.txt", b"[]"):
        return  # which is a text
    (folder / name).write_bytes(content)
    assert_refused(dry_run(name), "has 0 rows", name)


@pytest.mark.promise(33)
def test_null_missing_and_repeated_rows_are_counted_and_refused(folder: Path) -> None:
    bad: list[Any] = [
        None, 7, {}, {"instruction": "a"}, {"output": "b"}, {"instruction": None, "output": "b"},
        {"instruction": "a", "output": ""},
    ]  # fmt: skip
    lines = [json.dumps(row) + "\n" for row in bad]
    (folder / "rows.jsonl").write_text("".join([*LINES, *lines, LINES[0], LINES[0]]), "utf-8")
    shown = inspect("rows.jsonl").stdout
    assert "rows:      18 read, 11 usable, 2 duplicates" in shown
    assert sum(map(int, re.findall(r"^(?:unusable:|          ) +(\d+) ", shown, re.M))) == 7
    assert_refused(dry_run("rows.jsonl"), "7 of 18 rows can't be used", "null instead of a row")
    assert dry_run("rows.jsonl", "data.on_invalid=skip").returncode == 0


@pytest.mark.promise(34)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_ragged_table_shifts_nothing_and_text_stays_text(folder: Path, delimiter: str) -> None:
    cells = ["NA", "007", "1e5", "null", "TRUE", "2024-01-02", " x ", "-", "=1+1"]
    rows = [["id", "question", "answer"], *(["1", "q", cell] for cell in cells)]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([*rows, ["2", "q"], ["3", "q", "a", "more"]])
    (folder / "rows.csv").write_text(text.getvalue(), "utf-8")
    done = dry_run("rows.csv")
    assert_refused(
        done, "2 of 11 rows", "2 cells where the header has 3", "4 cells where", "line 11"
    )
    shown = inspect("rows.csv", samples=11).stdout
    assert "9 usable" in shown
    assert all(f"⟦{cell}<|im_end|>⟧" in shown or f"⟦{cell}⟧" in shown for cell in cells), shown


@pytest.mark.promise(35)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_huge_row_is_cut_or_dropped_by_choice_in_bounded_memory(folder: Path, name: str) -> None:
    huge = {"instruction": "huge", "output": "汉字ab" * 150_000}  # 1.2 MB, and as many tokens
    rows = [huge, *ROWS]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if name == "rows.csv":
        cells = [f"{row['instruction']},{row['output']}" for row in rows]
        lines = ["instruction,output", *cells]
    (folder / name).write_text("\n".join(lines), "utf-8")
    inspect("bundled-short")  # the imports
    with memory_within(150 << 20):
        done = inspect(name)
    assert "max 1,200,025\n" in done.stdout, done.stdout
    assert "cut:       1 rows (10.0%) at max_length" in done.stdout
    dropped = dry_run(name, "data.truncation=drop", "data.max_length=256")
    assert "dropped:   1 longer than max_length" in dropped.stdout, dropped.stderr


# --- chat templates ------------------------------------------------------------------------------

_RENDER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' "
    "}}{% endfor %}"
)


@pytest.mark.promise(28)
@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch reached') }}",
        "{{ lipsum.__globals__['os'].system('touch reached') }}",
        "{{ joiner.__init__.__globals__.os.system('touch reached') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ raise_exception.__code__.co_consts }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ ''|attr('__class__') }}",
        "{{ (messages|map(attribute='__class__')|list) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '%s'|format(messages.__class__) }}",
        "{{ messages.append(1) }}{{ messages.__len__.__self__.__class__ }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ range.__class__ }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{% extends '/etc/passwd' %}",
        "{{ ().__reduce_ex__(2) }}",
        "{{ (cycler.reset.__func__).__globals__ }}",
    ],
)
@pytest.mark.parametrize("door", ["option", "recipe", "model"])
def test_template_that_reaches_for_python_gets_nothing(
    folder: Path, attack: str, door: str
) -> None:
    (folder / "rows.jsonl").write_text("".join(LINES), "utf-8")
    template = folder / "template.jinja"
    template.write_text(attack + _RENDER)
    if door == "option":
        done = inspect("rows.jsonl", "--chat-template", "template.jinja", samples=1)
    elif door == "recipe":
        done = dry_run("rows.jsonl", "data.chat_template=template.jinja")
    else:
        model = folder / "model"
        model.mkdir()
        for path in MODEL.iterdir():
            (model / path.name).symlink_to(path)
        (model / "chat_template.jinja").unlink()
        template.rename(model / "chat_template.jinja")
        done = inspect("rows.jsonl", "--model", "model", samples=1)
    assert not (folder / "reached").exists()
    shown = done.stdout + done.stderr
    leaks = (
        "<class",
        "<function",
        "<built-in",
        "<module",
        "<jinja2",
        "root:x:",
        "co_consts",
        "CodeType",
    )
    assert not [word for word in leaks if word in shown], shown
    if done.returncode:
        assert_refused(done)
