"""Read a data file's bytes as a stream: unpack gzip, and zip archives with one data file in them.

Other kinds of files are recognised by their content and refused by name. Nothing is written to
disk, and memory is bounded by the size of a block.
"""

from __future__ import annotations

import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_errors, printable

Compression = Literal["", "gzip", "zip"]
_TABLE_SUFFIXES = (".json", ".jsonl", ".csv")
TEXT_SUFFIXES = (*_TABLE_SUFFIXES, ".txt")

_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
_HEAD_BYTES = 4096  # enough to recognise every kind below
_SHOWN_MEMBERS = 10

_UNPACK = _("Unpack it and use the data file in it (plain, gzip, or a zip with one data file).")
_EXPORT = _("Open it and save the sheet as CSV (UTF-8).")
_DOWNLOAD = _("Download the data file itself (on a web page: the link `raw` or `download`).")
# By the first bytes: what the file is, and what to do about it.
_REFUSED = (
    (rb"version https://git-lfs", _("a git-lfs pointer, not the data that it stands for"),
     _("Run `git lfs pull` in its folder, or download the file itself.")),
    (rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html)", _("a web page (HTML)"), _DOWNLOAD),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", _("an XML file"), _("Convert it to JSON Lines or CSV.")),
    (rb"\xd0\xcf\x11\xe0", _("an old Excel or Office file"), _EXPORT),
    (rb"%PDF-", _("a PDF file"), _("Copy its text into a JSON Lines or CSV file.")),
    (rb"SQLite format 3\0", _("an SQLite database"), _("Export the table as CSV.")),
    (rb"ARROW1\0\0", _("an Arrow file"), _("Save the data set as Parquet.")),
    (rb"\x89HDF", _("an HDF5 file"), _("Save the rows as JSON Lines or Parquet.")),
    (rb"\x80[\x02-\x05][\x95(}\]c]", _("a Python pickle"), _("Save the rows as JSON Lines.")),
    (rb"7z\xbc\xaf\x27\x1c", _("a 7z archive"), _UNPACK),
    (rb"Rar!\x1a\x07", _("a RAR archive"), _UNPACK),
    (rb"\xfd7zXZ\0", _("an xz archive"), _UNPACK),
    (rb"BZh[1-9]1AY", _("a bzip2 archive"), _UNPACK),
    (rb"\x28\xb5\x2f\xfd", _("a zstd archive"), _UNPACK),
    (rb".{257}ustar", _("a tar archive"), _UNPACK),
    (rb"PK\x05\x06", _("an empty zip archive"), _("Choose a file with rows in it.")),
)  # fmt: skip
_OFFICE = {
    "xl/": (_("an Excel workbook (.xlsx)"), _EXPORT),
    "word/": (_("a Word document"), _("Copy its text into a JSON Lines or CSV file.")),
    "content.xml": (_("an OpenDocument file"), _EXPORT),
}


def inspect_file(path: Path) -> tuple[Compression, str, bytes]:
    """Return the file's compression, the name of the file in it, and its first bytes.

    Raises:
        UserError: the file is of a kind that has no rows, or is a damaged archive.
    """
    with _open(path) as (compression, name, stream):
        head = _read(path, stream, _HEAD_BYTES)
    for pattern, kind, fix in _REFUSED:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            raise _refused(path, kind, fix)
    if compression and head.startswith((_GZIP, _ZIP, b"PAR1")):
        raise _refused(path, _("a compressed file inside another"), _UNPACK)
    return compression, name, head


def read_blocks(path: Path, size: int) -> Iterator[bytes]:
    """Yield the unpacked content in blocks of `size` bytes."""
    with _open(path) as (_compression, _name, stream):
        while block := _read(path, stream, size):
            yield block


@contextmanager
def _open(path: Path) -> Iterator[tuple[Compression, str, IO[bytes]]]:
    with disk_errors(path), path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(_GZIP):
            name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield "gzip", name, cast(IO[bytes], unpacked)
        elif magic == _ZIP:
            try:
                archive = zipfile.ZipFile(file)
                member = _only_member(path, archive)
                stream = archive.open(member)
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
                raise _damaged(path, error) from None
            with archive, stream:
                yield "zip", member.filename, stream
        else:
            yield "", path.name, file


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    # `ZipInfo.is_dir` of Python 3.11 and older fails on an empty name.
    members = [member for member in archive.infolist() if not member.filename.endswith("/")]
    for start, (kind, fix) in _OFFICE.items():
        if any(member.filename.startswith(start) for member in members):
            raise _refused(path, kind, fix)
    members = [
        member
        for member in members
        if not any(
            part.startswith((".", "__MACOSX")) for part in PurePosixPath(member.filename).parts
        )
    ]
    data = [member for member in members if member.filename.lower().endswith(_TABLE_SUFFIXES)]
    if len(data or members) == 1:
        (member,) = data or members
        if member.flag_bits & 1:
            raise _refused(path, _("an encrypted zip archive"), _UNPACK)
        return member
    names = [printable(member.filename) for member in (data or members)[:_SHOWN_MEMBERS]]
    raise UserError(
        _("This zip archive has {count} data files, not one: {names}."),
        str(path),
        _UNPACK,
        count=len(data),
        names=", ".join([*names, *["…"][: len(data or members) > _SHOWN_MEMBERS]]) or "–",
    )


def _read(path: Path, stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        # What gzip and bz2 raise about damage is an OSError without a number; a disk's has one.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        _("This archive is damaged or cut off, or can't be unpacked: {reason}."),
        str(path),
        _("Download or copy it again, or unpack it with another program."),
        reason=printable(str(error)),
    )


def _refused(path: Path, kind: str, fix: str) -> UserError:
    return UserError(
        _("This file is {kind}; rows can't be read from it."),
        str(path),
        fix,
        kind=Message(kind),
    )
