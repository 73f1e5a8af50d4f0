"""From a name to numbered rows: finding the files, their encoding, their container.

`resolve` turns what a person named (the bundled set, a file, a hub data set) into files;
`read_rows` streams one file as rows. Container and encoding come from the content, not from
the suffix. A broken row is handed on as `Broken`, so that the caller can count it; a byte that
is no text ends the reading. Memory stays within a few times the largest row.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jetson_ft import hub
from jetson_ft.errors import UserError
from jetson_ft.paths import cache_dir, disk_errors, printable, sha256_file, write_atomic
from jetson_ft.recipe import HUB_ID

Container = Literal["json", "jsonl", "csv", "parquet"]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
BLOCK = 1 << 20  # bytes read at a time
LONGEST_ROW = 1 << 28  # characters; a quote or bracket never closed must not fill the memory

_NOT_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_ROW_LISTS = {"messages", "conversations", "history"}  # lists inside a row, not lists of rows


@dataclass(frozen=True)
class Source:
    """What a person named as data, and the files it stands for."""

    kind: Literal["bundled", "file", "hub"]
    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class FileInfo:
    """What was found out about a file; `key` names the list when rows lie inside an object."""

    path: Path
    container: Container
    encoding: str
    size: int
    sha256: str
    key: str = ""


@dataclass(frozen=True)
class Broken:
    """A row that can't be read, with a reason short enough to be counted."""

    reason: str


@dataclass(frozen=True)
class RawRow:
    """One row: its number and, in a text file, the line it starts on, both from 1."""

    number: int
    line: int | None
    value: dict[str, Any] | Broken


_Located = tuple[int | None, Any]  # line, and a parsed value or `Broken`


# Finding the files


def bundled_train() -> Path:
    """The Chinese training rows that come along."""
    return Path(__file__).with_name("bundled") / "zh_train.jsonl"


def bundled_heldout() -> Path:
    """The rows that come along to measure with, none of them in `bundled_train`."""
    return Path(__file__).with_name("bundled") / "zh_heldout.jsonl"


def resolve(name: str) -> Source:
    """The files behind `bundled`, a path, or `owner/name[/file]` on the hub (fetched)."""
    if name == "bundled":
        return Source("bundled", name, (bundled_train(),))
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    with disk_errors(path):
        if path.is_file():
            return Source("file", name, (path,))
        repo, inside = _hub_parts(name)
        if repo and not path.exists():
            return Source("hub", name, _hub_files(repo, inside))
        raise _no_such_file(path)


def _hub_parts(name: str) -> tuple[str, str]:
    """(`owner/name`, file inside or nothing), or two empty strings for what must be a path."""
    owner, _, rest = name.partition("/")
    title, _, inside = rest.partition("/")
    repo = f"{owner}/{title}"
    missing_file = Path(owner).is_dir() if inside else title.endswith(SUFFIXES)
    return ("", "") if missing_file or not HUB_ID.fullmatch(repo) else (repo, inside)


def _no_such_file(path: Path) -> UserError:
    folder = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if path.is_dir():
        files = ", ".join(name for name in names if name.endswith(SUFFIXES)) or "none are in it"
        return UserError(
            "This is a folder, not a data file.", str(path), f"Name a data file in it ({files})."
        )
    near = difflib.get_close_matches(path.name, names, 1)
    hint = f"Did you mean `{folder / near[0]}`? " if near else ""
    return UserError(
        "There is no such data file.",
        str(path),
        f"{hint}`data.train` takes `bundled`, a file ({', '.join(SUFFIXES)}) or a hub data set "
        "such as `owner/name`.",
    )


def _hub_files(repo: str, inside: str) -> tuple[Path, ...]:
    listed = hub.list_files(repo, "dataset")
    chosen = [inside] if inside in listed else _training_files(repo, inside, listed)
    folder = hub.fetch(repo, "dataset", [glob.escape(name) for name in chosen])
    for name in chosen:
        if not (folder / name).is_file():
            raise UserError(f"{name!r} was not downloaded.", repo, "Try again with a network.")
    return tuple(folder / name for name in chosen)


def _training_files(repo: str, inside: str, listed: list[str]) -> list[str]:
    """The one file that holds the rows, or its numbered parts; a `UserError` when in doubt."""
    data = [name for name in listed if name.endswith(SUFFIXES) and Path(name).name not in _NOT_ROWS]
    training = [name for name in data if re.search(r"(?<![a-z])train", name.lower())] or data
    wholes = {re.sub(r"\d+-of-\d+", "", name) for name in training}
    if len(wholes) == 1 and not inside:
        return sorted(training)
    if not data:
        what = f"The data set {repo!r} holds no file of a kind read here ({', '.join(SUFFIXES)})."
        raise UserError(what, repo, "Download and convert it, then name the file's path.")
    names = ", ".join(data[:20]) + (f" and {len(data) - 20} more" if len(data) > 20 else "")
    what = f"The data set {repo!r} holds several files" if not inside else f"No file {inside!r}"
    raise UserError(
        f"{what}. There are: {names}.", repo, f"Name one, as in `data.train: {repo}/FILE`."
    )


# Reading a file


def read_rows(path: Path, encoding: str = "auto") -> tuple[FileInfo, Iterator[RawRow]]:
    """What the file is, and its rows as a stream.

    Raises:
        UserError: not readable, no rows, an undecidable encoding; while iterating: a byte that
            is not text of that encoding.
    """
    sha256 = file_sha256(path)
    size = path.stat().st_size
    with disk_errors(path), path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        return FileInfo(path, "parquet", "", size, sha256), _numbered(path, _parquet_rows(path))
    encoding = detect_encoding(path) if encoding == "auto" else _known_encoding(encoding)
    head = _head(path, encoding)
    container = _container(head, path.suffix.lower())
    key = _list_key(path, encoding) if container == "json" else ""
    if container == "json":
        rows = _json_rows(path, encoding, key)
    elif container == "jsonl":
        rows = _jsonl_rows(path, encoding)
    else:
        rows = _csv_rows(path, encoding, head)
    return FileInfo(path, container, encoding, size, sha256, key), _numbered(path, rows)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file, remembered until its size, time or inode changes."""
    with disk_errors(path):
        found = path.stat()
    identity = f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ino}"
    known = cache_dir("data", "hashes") / hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    if known.is_file() and len(remembered := known.read_text()) == 64:
        return remembered
    digest = sha256_file(path)
    write_atomic(known, digest)
    return digest


def shown(text: str) -> str:
    """`printable`, and with half surrogate pairs (from JSON or file names) made visible too."""
    return printable(text).encode(errors="backslashreplace").decode()


def _numbered(path: Path, located: Iterator[_Located]) -> Iterator[RawRow]:
    number = 0
    for number, (line, value) in enumerate(located, 1):
        if not isinstance(value, dict | Broken):
            value = Broken("null instead of a row" if value is None else "not an object")
        yield RawRow(number, line, value)
    if not number:
        raise _no_rows(path)


def _no_rows(path: Path) -> UserError:
    return UserError("This file has 0 rows.", str(path), "Name a file with rows in it.")


def _head(path: Path, encoding: str) -> str:
    """The beginning of the text, white space before it left out."""
    head = ""
    for text in _text(path, encoding):
        head = (head + text).lstrip()
        if len(head) >= 1 << 16:
            break
    if not head:
        raise _no_rows(path)
    return head


def _container(head: str, suffix: str) -> Container:
    """What the text is by its first lines; the suffix counts where those leave it open."""
    if head[0] == "[":
        return "json"
    if head[0] == "{":
        return "jsonl" if suffix == ".jsonl" or _is_jsonl(head) else "json"
    by_suffix: dict[str, Container] = {".json": "json", ".jsonl": "jsonl"}
    return by_suffix.get(suffix, "csv")


def _is_jsonl(head: str) -> bool:
    """Whether one of the first lines is an object by itself and another one follows."""
    lines = [line for line in head.split("\n", 20)[:20] if line.strip()]
    return any(
        isinstance(_parse(line), dict) and following.startswith("{")
        for line, following in itertools.pairwise(lines)
    ) or (len(lines) > 1 and isinstance(_parse(lines[-1]), dict))


def _parse(text: str) -> Any:
    """The JSON value, or `Broken`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Broken(f"not valid JSON ({_reason(error)})")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number too long"


# Encodings and text


class _BadByte(UserError):
    """A byte that is not text of the encoding."""


_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_COMMON_HANZI = "的一是不了在人有我"
_UTF8_HANZI = re.compile(rb"(?:[\xe3-\xe9][\x80-\xbf]{2}){4}")  # never met in GB18030 text
_NON_ASCII = bytes(range(128, 256))


def detect_encoding(path: Path) -> str:
    """The encoding, judged over the whole file; a `UserError` when it can't be told.

    A file that is UTF-8 but for a few bytes is called UTF-8 (reading it names the bad byte),
    since GB18030 can be read into almost anything.
    """
    with disk_errors(path), path.open("rb") as file:
        head = file.read(4096)
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    if b"\0" in head:
        raise _unclear(path, "It holds NUL bytes: UTF-16 without a byte order mark, or no text.")
    try:
        for _ in _text(path, "utf-8"):
            pass
    except _BadByte as bad:
        utf8, chinese = _evidence(path)
        if utf8 >= 0.9:
            return "utf-8"
        if chinese >= 0.9:
            return "gb18030"
        raise _unclear(path, f"It is not UTF-8 ({bad.where}) and not clearly GB18030.") from None
    return "utf-8"


def _evidence(path: Path) -> tuple[float, float]:
    """The shares of the non-ASCII bytes that are UTF-8, and that are Chinese in GB18030.

    The second is zero if whole words in UTF-8 stand between (mixed encodings), or if the usual
    characters are missing (Korean and Japanese encodings use the same bytes).
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("ignore")
    gb = codecs.getincrementaldecoder("gb18030")("ignore")
    non_ascii = as_utf8 = as_gb = characters = common = 0
    mixed = False
    with disk_errors(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            ascii_bytes = len(block.translate(None, _NON_ASCII))
            non_ascii += len(block) - ascii_bytes
            as_utf8 += len(utf8.decode(block).encode()) - ascii_bytes
            text = gb.decode(block)
            # GB2312 is the part in everyday use; chance hits lie outside of it.
            as_gb += len(text.encode("gb2312", "ignore")) - ascii_bytes
            characters += len(text) - ascii_bytes
            common += sum(text.count(character) for character in _COMMON_HANZI)
            mixed = mixed or bool(_UTF8_HANZI.search(block))
    unusual = characters > 100 and common < 0.03 * characters
    return as_utf8 / non_ascii, 0.0 if mixed or unusual else as_gb / non_ascii


def _unclear(path: Path, what: str) -> UserError:
    return UserError(
        f"The text encoding of this file can't be told. {what}",
        str(path),
        "Name it, as in `--set data.encoding=gb18030` (or utf-16-le, big5, cp1252, …), or save "
        "the file as UTF-8. A packed file must be unpacked first.",
    )


def _known_encoding(name: str) -> str:
    try:
        b"\n\0\0\0".decode(name)  # refuses codecs that make no text
        if (known := codecs.lookup(name).name) not in ("idna", "punycode"):
            return known
    except (LookupError, ValueError):
        pass
    fix = "Use `auto`, or a name such as utf-8, utf-16, gb18030, gbk, big5."
    raise UserError(f"There is no text encoding {name!r}.", "data.encoding", fix)


def _text(path: Path, encoding: str) -> Iterator[str]:
    """The decoded file in pieces, without byte order mark; a bad byte is located."""
    # The "-sig" codec would report places without its mark.
    decoder = codecs.getincrementaldecoder("utf-8" if encoding == "utf-8-sig" else encoding)()
    offset, line, block, start = 0, 1, b"-", True
    with disk_errors(path), path.open("rb") as file:
        while block:
            block, state = file.read(BLOCK), decoder.getstate()
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = error.start - (len(error.object) - len(block))
                decoder.setstate(state)
                with suppress(UnicodeError):  # UTF-16 without its mark at the start has no lines
                    line += decoder.decode(block[: max(0, at)]).count("\n")
                byte = error.object[error.start]
                raise _bad_byte(path, encoding, byte, line, offset + at) from None
            except UnicodeError as error:  # a missing byte order mark, for instance
                what = f"This file is not {encoding} text: {error}."
                raise UserError(what, str(path), "Name another encoding.") from None
            offset, line = offset + len(block), line + text.count("\n")
            if text and start:
                text, start = text.removeprefix("\ufeff"), False
            if text:
                yield text


def _bad_byte(path: Path, encoding: str, byte: int, line: int, offset: int) -> _BadByte:
    return _BadByte(
        f"This file is {encoding} text, but the byte 0x{byte:02x} in it is not.",
        f"{path}, line {line}, byte {offset} counted from 0",
        "Mend that byte (mixed encodings or a cut-off file are the usual causes), or name "
        "another encoding with `--set data.encoding=…`.",
    )


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines with their ends; only `\\n` ends one (`\\r` and U+2028 may stand in a text)."""
    pending: list[str] = []
    length = 0
    for text in _text(path, encoding):
        first, *others = text.split("\n")
        pending.append(first)
        length += len(first)
        if length > LONGEST_ROW:
            what = f"A line is longer than {LONGEST_ROW >> 20} Mi characters."
            raise UserError(what, str(path), "Is this a text file? Split what is so long.")
        for piece in others:
            pending.append("\n")
            yield "".join(pending)
            pending, length = [piece], len(piece)
    if last := "".join(pending):
        yield last


# JSON Lines


def _jsonl_rows(path: Path, encoding: str) -> Iterator[_Located]:
    for number, line in enumerate(_lines(path, encoding), 1):
        if not line.isspace():
            yield number, _parse(line)


# JSON


class _BrokenJson(Exception):
    """Why the JSON can't be read on; the window stands where it broke."""


class _Window:
    """A stretch of the text that moves on as JSON values are taken from its front."""

    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    opening = re.compile(r"\[[ \t\r\n]*[^ \t\r\n]")

    def __init__(self, pieces: Iterator[str]) -> None:
        self.line = 1
        self._pieces, self._text, self._at, self._ended = pieces, "", 0, False

    def peek(self) -> str:
        """The next character that is not white space; nothing at the end."""
        while True:
            found = self.space.match(self._text, self._at)
            self._advance(found.end() if found else self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._grow()

    def take(self, wanted: str) -> str:
        """Steps over the next character, which must be one of `wanted`."""
        found = self.peek()
        if not found:
            raise _BrokenJson("cut off")
        if found not in wanted:
            raise _BrokenJson(f"not valid JSON (`{'` or `'.join(wanted)}` is missing)")
        self._advance(self._at + 1)
        return found

    def value(self) -> Any:
        """The next JSON value, however long."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                cut = self._is_cut(error)
                if self._ended or not cut:
                    reason = "cut off" if cut else f"not valid JSON ({_reason(error)})"
                    raise _BrokenJson(reason) from None
            else:
                # A number at the very end may have more digits to come.
                if self._ended or end < len(self._text) - 3:
                    self._advance(end)
                    return value
            self._grow()

    def at_objects(self) -> bool:
        """Whether a list that begins with an object comes next."""
        if self.peek() != "[":
            return False
        while not (found := self.opening.match(self._text, self._at)) and not self._ended:
            self._grow()
        return found is not None and found.group().endswith("{")

    def _is_cut(self, error: Exception) -> bool:
        """Whether the error may come from the window's end instead of the text."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        margin = 0 if self._ended else 16  # as long as a half-seen word or escape can be
        return error.pos >= len(self._text) - margin or error.msg.startswith("Unterminated")

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _grow(self) -> None:
        """Drops what was taken and reads on; doubling keeps retries linear in a row's length."""
        pieces = [self._text[self._at :]]
        length = wanted = len(pieces[0])
        if length > LONGEST_ROW:
            raise _BrokenJson(f"longer than {LONGEST_ROW >> 20} Mi characters")
        while length <= 2 * wanted and not self._ended:
            pieces.append(next(self._pieces, ""))
            length += len(pieces[-1])
            self._ended = not pieces[-1]
        self._text, self._at = "".join(pieces), 0


def _json_rows(path: Path, encoding: str, key: str) -> Iterator[_Located]:
    """The rows of an array, of the list `key` in an object, or of objects in succession."""
    window = _Window(_text(path, encoding))
    try:
        if window.peek() == "{" and not key:
            while window.peek():
                yield window.line, window.value()
            return
        if key:
            window.take("{")
            _next_list(window)
        yield from _array(window)
        if key and window.take(",}") == "," and (second := _next_list(window)):
            raise _BrokenJson(f"a second list of rows, `{second}`, besides `{key}`")
        if window.peek():
            raise _BrokenJson("text after the end of the JSON")
    except _BrokenJson as error:
        yield window.line, Broken(f"{error}; nothing from here on can be read")


def _array(window: _Window) -> Iterator[_Located]:
    window.take("[")
    if window.peek() == "]":
        window.take("]")
        return
    separator = ","
    while separator == ",":
        window.peek()
        yield window.line, window.value()
        separator = window.take(",]")


def _list_key(path: Path, encoding: str) -> str:
    """The key under which an object holds the rows; nothing if it is no such object."""
    window = _Window(_text(path, encoding))
    try:
        window.take("{")
        return _next_list(window)
    except _BrokenJson:
        return ""


def _next_list(window: _Window) -> str:
    """From before a key to the next list of objects; its key, or nothing at the object's end."""
    separator = ","
    while separator == ",":
        key = window.value()
        window.take(":")
        if not isinstance(key, str):
            raise _BrokenJson("not valid JSON (a key is not text)")
        if key not in _ROW_LISTS and window.at_objects():
            return shown(key)
        window.value()
        separator = window.take(",}")
    return ""


# CSV


def _csv_rows(path: Path, encoding: str, head: str) -> Iterator[_Located]:
    first_line = head.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    header: list[str] = []
    for line, cells in _csv_records(_lines(path, encoding), delimiter):
        if isinstance(cells, Broken):
            yield line, cells
        elif not header:
            header = _header(path, line, cells)
        elif len(cells) != len(header):
            columns = f"{len(cells)} column" + "s" * (len(cells) != 1)
            yield line, Broken(f"{columns} where the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _csv_records(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | Broken]]:
    """The records that are not blank, each with the line it starts on."""
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Broken(f"not valid CSV ({error})")
        else:
            if cells:
                yield line, cells


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise UserError(
            "The first line of a CSV file must name the columns, each differently.",
            f"{path}, line {line}",
            "Put a header above the rows, such as `instruction,input,output`.",
        )
    return names


# Parquet


def _parquet_rows(path: Path) -> Iterator[_Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # Small batches, since a row may be large.
            for batch in file.iter_batches(batch_size=64):
                yield from ((None, value) for value in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        yield (
            None,
            Broken(f"damaged Parquet ({shown(str(error))}); nothing from here on can be read"),
        )
