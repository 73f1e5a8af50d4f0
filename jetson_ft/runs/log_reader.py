"""Read a run's `log.txt`, of any size and content, in bounded memory.

It holds this program's own lines (`E jetson_ft.runs.worker: …`), what libraries print, and
tracebacks. Of a progress bar, which overwrites its line, the last state is kept.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jetson_ft.files import printable
from jetson_ft.runs import contents

FILE = "log.txt"
_BLOCK_BYTES = 1 << 20
_MAX_LINE = 4000  # characters that are shown of a line
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"E |\S*(Error|Exception)\b.*:|CRITICAL|FATAL")
_WARNING = re.compile(r"W |.*(\bWARNING\b|Warning: )")


@dataclass(frozen=True)
class Line:
    """A line, and its level: `error`, `warning`, `debug`, or `` for any other."""

    text: str
    level: str


@dataclass(frozen=True)
class Matches:
    """The lines with a text: how many, and the last of them."""

    count: int
    lines: list[Line]


def read_tail(folder: Path, limit: int) -> tuple[list[Line], bool]:
    """Return the last lines, of at most `limit` bytes, and whether there are earlier ones.

    Raises:
        DamagedRun: `log.txt` can't be read.
    """
    if not os.path.lexists(folder / FILE):
        return [], False
    with contents.open_file(folder / FILE) as file:
        start = max(0, file.seek(0, os.SEEK_END) - limit)
        file.seek(start)
        data = file.read(limit)
    if start:  # the first line may be the end of one
        data = data.partition(b"\n")[2] or data
    return _with_levels(data.split(b"\n")), start > 0


def search(folder: Path, text: str, limit: int) -> Matches:
    """Return the lines that contain a text, without regard to case in ASCII; at most `limit`.

    The text is not empty.

    Raises:
        DamagedRun: `log.txt` can't be read.
    """
    needle, count = text.encode("utf-8", "surrogatepass").lower(), 0
    last: deque[bytes] = deque(maxlen=limit)
    for block in _whole_lines(folder):
        lowered = block.lower()
        position = lowered.find(needle)
        while position >= 0:
            end = lowered.find(b"\n", position + len(needle))  # the text may have a line break
            end = len(block) if end < 0 else end
            last.append(block[lowered.rfind(b"\n", 0, position) + 1 : end])
            count += 1
            position = lowered.find(needle, end)
    return Matches(count, _with_levels(last))


def iter_bytes(folder: Path) -> Iterator[bytes]:
    """Yield the file in blocks, as far as it goes now: it may grow meanwhile.

    Raises:
        DamagedRun: `log.txt` can't be read.
    """
    with contents.open_file(folder / FILE) as file:
        rest = os.fstat(file.fileno()).st_size
        while rest and (block := file.read(min(rest, _BLOCK_BYTES))):
            rest -= len(block)
            yield block


def _whole_lines(folder: Path) -> Iterator[bytes]:
    """Yield blocks that end with a line; of a line longer than a block, parts."""
    if not os.path.lexists(folder / FILE):
        return
    rest = b""
    for block in iter_bytes(folder):
        data = rest + block
        end = data.rfind(b"\n") + 1 or len(data)
        rest = data[end:]
        yield data[:end]
    yield rest


def _with_levels(lines: Sequence[bytes] | deque[bytes]) -> list[Line]:
    """Return the lines as text with their levels; empty ones at the end are left out."""
    result, in_traceback = [], False
    for data in lines:
        line = data.decode("utf-8", "replace").rstrip("\r")
        text = printable(line.rpartition("\r")[2][:_MAX_LINE])
        is_first = text.startswith(_TRACEBACK)
        if is_first or in_traceback or _ERROR.match(text):
            level = "error"
        elif _WARNING.match(text):
            level = "warning"
        else:
            level = "debug" if text.startswith("D ") else ""
        # A traceback goes on in indented lines, and ends with that of the exception.
        in_traceback = is_first or (in_traceback and text.startswith(" "))
        result.append(Line(text, level))
    while result and not result[-1].text:
        result.pop()
    return result
