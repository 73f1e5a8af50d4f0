"""Text encodings: detect the one of a file, decode the file in blocks, split it into lines."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jetson_ft.data.compression import inspect_file, read_blocks
from jetson_ft.errors import Message, UserError, _

BLOCK_BYTES = 1 << 20  # read at a time
MAX_ROW_CHARACTERS = 1 << 28  # a quote or bracket that is never closed must not fill the memory

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
    """Return the encoding, judged over the whole file; a `UserError` if it is not clear.

    A file that is UTF-8 but for a few bytes is called UTF-8 (reading it reports the invalid byte),
    since almost any bytes can be decoded as GB18030.
    """
    _compression, _name, head = inspect_file(path)
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    template = _("It contains NUL bytes: it is UTF-16 without a byte order mark, or not text.")
    where = Message("")
    if b"\0" not in head:
        try:
            for _block in decode_file(path, "utf-8"):
                pass
            return "utf-8"
        except UserError as error:
            template, where = _("It is not UTF-8 ({where}) and not clearly GB18030."), error.where
        utf8, chinese = _encoding_shares(path)
        if utf8 >= 0.9:
            return "utf-8"
        if chinese >= 0.9:
            return "gb18030"
    raise UserError(
        _("The text encoding of this file can't be detected. {reason}"),
        str(path),
        _(
            "Save the file as UTF-8. For the file of `data.train`, its encoding can be set "
            "instead, as in `--set data.encoding=gb18030` (or utf-16-le, big5, cp1252, …)."
        ),
        reason=Message(template, {"where": where}),
    )


def _encoding_shares(path: Path) -> tuple[float, float]:
    """Return the shares of the non-ASCII bytes that are UTF-8, and Chinese text in GB18030.

    The second is zero if the file also has words in UTF-8 (mixed encodings), or if the most common
    characters are rare (Korean and Japanese encodings use the same bytes).
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("ignore")
    gb = codecs.getincrementaldecoder("gb18030")("ignore")
    non_ascii = as_utf8 = as_gb = characters = common = 0
    mixed = False
    for block in read_blocks(path, 1 << 20):
        ascii_bytes = len(block.translate(None, _NON_ASCII))
        non_ascii += len(block) - ascii_bytes
        as_utf8 += len(utf8.decode(block).encode()) - ascii_bytes
        text = gb.decode(block)
        # GB2312 has the characters in everyday use; chance hits are outside of it.
        as_gb += len(text.encode("gb2312", "ignore")) - ascii_bytes
        characters += len(text) - ascii_bytes
        common += sum(text.count(character) for character in _COMMON_HANZI)
        mixed = mixed or bool(_UTF8_HANZI.search(block))
    unusual = characters > 100 and common < 0.03 * characters
    return as_utf8 / non_ascii, 0.0 if mixed or unusual else as_gb / non_ascii


def check_encoding(name: str) -> str:
    """Return the standard name of a text encoding; an unknown one raises a `UserError`."""
    try:
        b"\n\0\0\0".decode(name)  # refuses codecs that make no text
        if (standard := codecs.lookup(name).name) not in ("idna", "punycode"):
            return standard
    except (LookupError, ValueError):
        pass
    raise UserError(
        _("Unknown text encoding {name!r}."),
        "data.encoding",
        _("Use `auto`, or a name such as utf-8, utf-16, gb18030, gbk, big5."),
        name=name,
    )


def decode_file(path: Path, encoding: str) -> Iterator[str]:
    """Yield the decoded file in blocks, without its byte order mark.

    A byte that is not text in this encoding is a `UserError` with its line and offset.
    """
    # The "-sig" codec would report offsets without the mark.
    decoder = codecs.getincrementaldecoder("utf-8" if encoding == "utf-8-sig" else encoding)()
    offset, line, start = 0, 1, True
    for block in itertools.chain(read_blocks(path, BLOCK_BYTES), [b""]):
        state = decoder.getstate()
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            position = error.start - (len(error.object) - len(block))
            decoder.setstate(state)
            with suppress(UnicodeError):  # UTF-16 without its mark at the start has no lines
                line += decoder.decode(block[: max(0, position)]).count("\n")
            values = {"path": str(path), "line": line, "offset": offset + position}
            raise UserError(
                _("This file is {encoding} text, but the byte 0x{byte:02x} in it is not."),
                Message(_("{path}, line {line}, byte {offset} counted from 0"), values),
                _(
                    "Fix that byte (mixed encodings or a cut-off file are the usual causes), "
                    "or save the file as UTF-8. For the file of `data.train`, another encoding "
                    "can be set with `--set data.encoding=…`."
                ),
                encoding=encoding,
                byte=error.object[error.start],
            ) from None
        except UnicodeError as error:  # a missing byte order mark, for instance
            raise UserError(
                _("This file is not {encoding} text: {reason}."),
                str(path),
                _("Set another encoding."),
                encoding=encoding,
                reason=str(error),
            ) from None
        offset, line = offset + len(block), line + text.count("\n")
        if text and start:
            text, start = text.removeprefix("\ufeff"), False
        if text:
            yield text


def read_lines(path: Path, encoding: str) -> Iterator[str]:
    """Yield the lines with their ends; only `\\n` ends one (`\\r` and U+2028 can be in a text)."""
    pending: list[str] = []
    length = 0
    for text in decode_file(path, encoding):
        first, *others = text.split("\n")
        pending.append(first)
        length += len(first)
        if length > MAX_ROW_CHARACTERS:
            raise UserError(
                _("A line is longer than {limit} Mi characters."),
                str(path),
                _("Check that this is a text file, and split the long line."),
                limit=MAX_ROW_CHARACTERS >> 20,
            )
        for piece in others:
            pending.append("\n")
            yield "".join(pending)
            pending, length = [piece], len(piece)
    if last := "".join(pending):
        yield last
