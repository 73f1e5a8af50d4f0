"""Compressed files are read as streams; files of other kinds are refused by name."""

from __future__ import annotations

import errno
import gzip
import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_files import ROWS, as_csv, as_json, as_jsonl, block_bytes, quick, values, write

from jetson_ft.data.compression import read_blocks
from jetson_ft.data.formats import RowError
from jetson_ft.data.readers import read_rows
from jetson_ft.errors import UserError

METHODS = {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


def zipped(members: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "text", "container"),
    [
        ("a.jsonl", as_jsonl(ROWS), "jsonl"),
        ("a.json", as_json(ROWS), "json"),
        ("a.json", as_json({"data": ROWS}), "json"),
        ("a.csv", as_csv(ROWS), "csv"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_compressed_file_has_the_rows_of_its_content(
    tmp_path: Path, name: str, text: str, container: str, block: int, encoding: str
) -> None:
    content = text.encode(encoding)
    packed = {
        "gzip": (f"{name}.gz", gzip.compress(content[:9], mtime=0) + gzip.compress(content[9:])),
        "zip": ("a.zip", zipped({name: content, "README.md": "x", "__MACOSX/._a.csv": "y"})),
    }
    for compression, (file, data) in packed.items():
        path = write(tmp_path, file, data)
        with block_bytes(block):
            info, rows = read_rows(path)
            assert [row.value for row in rows] == ROWS
        properties = (info.container, info.encoding, info.compression, info.size)
        assert properties == (container, encoding, compression, len(data))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        file for file, _data in packed.values()
    )


def test_compression_is_detected_by_content(tmp_path: Path) -> None:
    assert values(write(tmp_path, "a.jsonl", gzip.compress(as_jsonl(ROWS).encode()))) == ROWS
    assert values(write(tmp_path, "b.csv", zipped({"rows.txt": as_csv(ROWS)}))) == ROWS
    assert values(write(tmp_path, "c.zip", as_jsonl(ROWS))) == ROWS


def test_errors_in_a_compressed_file_are_at_the_lines_of_its_content(tmp_path: Path) -> None:
    content = as_jsonl(ROWS * 20).encode() + b"\xff\n"
    with pytest.raises(UserError, match="is utf-8 text, but the byte 0xff") as caught:
        values(write(tmp_path, "a.jsonl.gz", gzip.compress(content, mtime=0)))
    assert f"line 41, byte {len(content) - 2} " in str(caught.value.where)


@pytest.mark.parametrize("compression", ["gzip", "zip"])
def test_archive_of_far_larger_content_is_read_in_bounded_memory(
    tmp_path: Path, compression: str
) -> None:
    path = tmp_path / "a"
    content = as_jsonl([{"a": " " * 100_000}] * 600)
    if compression == "zip":
        path.write_bytes(zipped({"a.jsonl": content}))
    else:
        path.write_bytes(gzip.compress(content.encode(), mtime=0))
    assert path.stat().st_size < 1 << 20 < 50 << 20 < len(content)
    rows = read_rows(path)[1]
    tracemalloc.start()
    assert sum(isinstance(row.value, dict) for row in rows) == 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"\xef\xbb\xbf<HTML><body>404", "web page"),
        (b"<?xml version='1.0'?><rows/>", "XML file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Excel"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "7z archive"),
        (b"Rar!\x1a\x07\x01\0", "RAR archive"),
        (b"\xfd7zXZ\0\0", "xz archive"),
        (b"BZh91AY&SY", "bzip2 archive"),
        (b"\x28\xb5\x2f\xfd\0", "zstd archive"),
        (b"a" * 257 + b"ustar\x0000", "tar archive"),
        (gzip.compress(b"a" * 257 + b"ustar\x0000", mtime=0), "tar archive"),
        (gzip.compress(b"PAR1", mtime=0), "compressed file inside another"),
        (zipped({"a.json": gzip.compress(b"[]", mtime=0)}), "compressed file inside another"),
        (b"%PDF-1.7\n", "PDF"),
        (b"SQLite format 3\0", "SQLite"),
        (b"ARROW1\0\0", "Arrow file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (pickle.dumps([{"a": 1}]), "Python pickle"),
        (zipped({}), "empty zip archive"),
        (zipped({"[Content_Types].xml": "", "xl/workbook.xml": "<x/>"}), "Excel workbook"),
        (zipped({"word/document.xml": "<x/>"}), "Word document"),
        (zipped({"content.xml": "<x/>"}), "OpenDocument"),
    ],
)
@pytest.mark.parametrize("encoding", ["auto", "utf-8"])
def test_file_of_another_kind_is_refused_by_name(
    tmp_path: Path, content: bytes, kind: str, encoding: str
) -> None:
    path = write(tmp_path, "a.json", content)
    with pytest.raises(UserError, match=f"This file is an? .*{kind}") as caught:
        values(path, encoding)
    assert str(caught.value.where) == str(path)
    assert str(caught.value.fix).endswith((".", ")."))


def test_zip_of_several_data_files_is_refused_with_their_names(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {f"d/{number}.json": "[]" for number in range(12)}
    with pytest.raises(UserError, match=r"has 12 data files, not one: d/0.json, .*d/9.json, …"):
        values(write(tmp_path, "a.zip", zipped(members)))
    with pytest.raises(UserError, match=r"has 0 data files, not one: a.txt, b.txt"):
        values(write(tmp_path, "a.zip", zipped({"a.txt": "", "b.txt": ""})))
    with pytest.raises(UserError, match="has 0 data files, not one: –"):
        values(write(tmp_path, "a.zip", zipped({".hidden": ""})))


def test_member_without_a_name_is_read(tmp_path: Path) -> None:
    archive = zipped({"@@@@": as_jsonl(ROWS)}).replace(b"@@@@", b"\0@@@")
    assert values(write(tmp_path, "a.zip", archive)) == ROWS


def test_encrypted_zip_is_refused(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.json": "[]"}))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + at] |= 1
    with pytest.raises(UserError, match="encrypted zip"):
        values(write(tmp_path, "a.zip", bytes(content)))


@quick
@given(data=st.data(), kind=st.sampled_from(["gzip", "zip", "bzip2 zip", "lzma zip"]))
def test_damaged_archive_gives_rows_or_a_user_error(
    tmp_path: Path, data: st.DataObject, kind: str
) -> None:
    text = as_jsonl(ROWS)
    method = METHODS.get(kind.removesuffix(" zip"), zipfile.ZIP_DEFLATED)
    packed = zipped({"a.jsonl": text}, method)
    content = bytearray(gzip.compress(text.encode(), mtime=0) if kind == "gzip" else packed)
    for _count in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = write(tmp_path, "a.jsonl", bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        rows = values(path)
    except UserError as error:
        assert str(path) in str(error.where)
    else:
        assert all(isinstance(row, dict | RowError) for row in rows)


@pytest.mark.parametrize("method", METHODS)
def test_zip_with_damaged_content_is_refused_as_damaged(tmp_path: Path, method: str) -> None:
    text = as_jsonl([{"a": f"{number}²"} for number in range(5000)])
    content = bytearray(zipped({"a.jsonl": text}, METHODS[method]))
    middle = len(content) // 2
    content[middle : middle + 40] = b"\xaa" * 40
    with pytest.raises(UserError, match="archive is damaged or cut off"):
        values(write(tmp_path, "a.zip", bytes(content)))


def test_fault_of_the_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    with pytest.raises(UserError, match="Input/output error"):
        values(write(tmp_path, "a.zip", zipped({"a.jsonl": as_jsonl(ROWS)})))


def test_cut_off_gzip_is_refused_as_damaged(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(as_jsonl(ROWS).encode())[:-20])
    with pytest.raises(UserError, match="damaged or cut off"):
        list(read_blocks(path, 100))
