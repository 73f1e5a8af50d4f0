"""Encodings are detected or refused, and an invalid byte is located."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import ROWS, as_csv, as_json, as_jsonl, block_bytes, quick, values, write

from jetson_ft.data import encodings
from jetson_ft.data.readers import read_rows
from jetson_ft.errors import UserError


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
def test_encoding_is_detected_and_reported(
    tmp_path: Path, encoding: str, named: str, block: int, suffix: str
) -> None:
    text = {"json": as_json(ROWS), "jsonl": as_jsonl(ROWS), "csv": as_csv(ROWS)}[suffix]
    with block_bytes(block):
        info, rows = read_rows(write(tmp_path, f"a.{suffix}", text.encode(encoding)))
        assert [row.value for row in rows] == ROWS
    assert info.encoding == named


@quick
@given(
    text=st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "gbk", "gb18030", "utf-8-sig"]),
    block=st.integers(1, 9),
)
def test_text_in_a_set_encoding_is_read_back(
    tmp_path: Path, text: str, encoding: str, block: int
) -> None:
    path = write(tmp_path, "a.jsonl", as_jsonl([{"a": text}]).encode(encoding))
    with block_bytes(block):
        assert values(path, encoding) == [{"a": text}]


@quick
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=60),
    encoding=st.sampled_from(["utf-8", "utf-16", "gb18030"]),
    block=st.integers(1, 9),
    data=st.data(),
)
def test_invalid_byte_is_reported_with_line_and_offset(
    tmp_path: Path, text: str, encoding: str, block: int, data: st.DataObject
) -> None:
    bad = {"utf-8": b"\xff", "utf-16": b"\x00\xdc", "gb18030": b"\xff"}[encoding]
    at = data.draw(st.integers(0, len(text)))
    before = text[:at].encode(encoding) or "".encode(encoding)
    after = text[at:].encode("utf-16-le" if encoding == "utf-16" else encoding)
    path = write(tmp_path, "a.txt", before + bad + after)
    with pytest.raises(UserError) as caught, block_bytes(block):
        "".join(encodings.decode_file(path, encoding))
    line = text[:at].count("\n") + 1
    assert str(caught.value.where) == f"{path}, line {line}, byte {len(before)} counted from 0"


def test_utf8_with_one_invalid_byte_is_reported_as_utf8(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode()
    at = content.index("公".encode(), 2000)
    line = content[:at].count(b"\n") + 1
    path = write(tmp_path, "a.jsonl", content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(UserError, match="is utf-8 text, but the byte 0xff") as caught:
        values(path)
    assert str(caught.value.where) == f"{path}, line {line}, byte {at} counted from 0"


def test_gb18030_with_one_invalid_byte_is_reported_as_gb18030(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode("gb18030") + b"\xff\n"
    with pytest.raises(UserError, match="is gb18030 text, but the byte 0xff") as caught:
        values(write(tmp_path, "a.jsonl", content))
    assert f"line 41, byte {len(content) - 2} " in str(caught.value.where)


def test_gb18030_after_a_megabyte_of_ascii_is_detected(tmp_path: Path) -> None:
    content = as_jsonl([{"a": "x" * 100}] * 12_000 + ROWS).encode("gb18030")
    info, rows = read_rows(write(tmp_path, "a.jsonl", content))
    assert info.encoding == "gb18030"
    assert list(rows)[-1].value == ROWS[-1]


def test_encoding_is_detected_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detected: list[Path] = []
    detect = encodings.detect_encoding
    monkeypatch.setattr(
        encodings, "detect_encoding", lambda path: (detected.append(path), detect(path))[1]
    )
    path = write(tmp_path, "a.jsonl", as_jsonl(ROWS))
    assert values(path) == values(path) == ROWS
    assert detected == [path]
    write(tmp_path, "a.jsonl", as_jsonl(ROWS).encode("gb18030"))
    assert values(path) == ROWS
    assert detected == [path, path]


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
def test_ambiguous_encoding_is_refused_with_a_fix(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="can't be detected") as caught:
        values(write(tmp_path, "a.jsonl", content))
    assert "data.encoding" in str(caught.value.fix)


def test_utf8_with_some_rows_in_gb18030_is_reported_with_the_line(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode() + as_jsonl(ROWS).encode("gb18030")
    with pytest.raises(UserError, match="is utf-8 text, but") as caught:
        values(write(tmp_path, "a.jsonl", content))
    assert "line 41," in str(caught.value.where)


@pytest.mark.parametrize("name", ["klingon", "rot13", "base64", "\0", "undefined", "punycode"])
def test_unknown_encoding_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="Unknown text encoding"):
        values(write(tmp_path, "a.jsonl", as_jsonl(ROWS)), name)
