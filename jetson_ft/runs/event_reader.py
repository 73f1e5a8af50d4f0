"""Read a run's `events.jsonl`, of any size and with damage, in bounded memory.

Lines that are damaged, of an unknown kind or too long are skipped. A last line without its newline
is still being written.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from jetson_ft.events import Event, from_json
from jetson_ft.runs.contents import open_file

E = TypeVar("E", bound=Event)
_BLOCK_BYTES = 1 << 20
_MAX_LINE_BYTES = 1 << 20


def read_events(path: Path, offset: int = 0, limit: int = _BLOCK_BYTES) -> tuple[list[Event], int]:
    """Return the events from a byte offset on, in at most `limit` bytes, and the next offset.

    A half-written last line is left for the next call.

    Raises:
        DamagedRun: it is not a file that can be read.
    """
    lines, offset = _read_lines(path, offset, limit)
    return [event for line in lines if (event := _parse_line(line))], offset


def iter_events(path: Path, *kinds: type[E]) -> Iterator[E]:
    """Yield the events of these kinds (`Event`: of all), the oldest first.

    Raises:
        DamagedRun: it is not a file that can be read.
    """
    offset, names = 0, _markers(kinds)
    while True:
        lines, end = _read_lines(path, offset, _BLOCK_BYTES)
        for line in lines:
            # Most lines need no parsing: they don't contain the kind's name.
            if any(name in line for name in names):
                event = _parse_line(line)
                if isinstance(event, kinds):
                    yield event
        if end == offset:
            return
        offset = end


def newest_event(path: Path, kind: type[E], attempt: int | None = None) -> E | None:
    """Return the newest event of a kind (`Event`: of any).

    Args:
        attempt: the last attempt, which the event must be of; None: any.

    Raises:
        DamagedRun: it is not a file that can be read.
    """
    (name,) = _markers((kind,))
    for lines in _blocks_backwards(path):
        for line in reversed(lines):
            if name in line:
                event = _parse_line(line)
                if isinstance(event, kind) and attempt in (None, event.attempt):
                    return event
        first = _first_event(lines)
        if first and attempt is not None and first.attempt < attempt:  # the attempt began after it
            return None
    return None


def offset_of_attempt(path: Path, attempt: int) -> int:
    """Return a byte offset before the attempt's first event, a block at most.

    Raises:
        DamagedRun: it is not a file that can be read.
    """
    if attempt <= 1 or not os.path.lexists(path):
        return 0
    with open_file(path) as file:
        start = file.seek(0, os.SEEK_END)
    while start:
        start = max(0, start - _BLOCK_BYTES)
        first = _first_event(_read_lines(path, start, _BLOCK_BYTES)[0])
        if first and first.attempt < attempt:  # as in `newest_event`
            break
    return start


def last_attempt_events(first: Iterable[Event], again: Iterable[E]) -> Iterator[E]:
    """Yield the events of `again` without those of a step that a later attempt has made again.

    Args:
        first: the same events, read once before, or all that have those steps.
        again: the events to yield.
    """
    newest: dict[str, array[int]] = {}  # kind -> the last attempt by step
    for event in first:
        step = getattr(event, "step", None)
        if step is not None:
            attempts = newest.setdefault(event.kind, array("H"))
            attempts.frombytes(bytes(2 * max(0, step + 1 - len(attempts))))
            attempts[step] = max(attempts[step], event.attempt)
    for event in again:
        step, attempts = getattr(event, "step", None), newest.get(event.kind, array("H"))
        if step is None or step >= len(attempts) or attempts[step] <= event.attempt:
            yield event


def _markers(kinds: Iterable[type[Event]]) -> list[bytes]:
    return [f'"{kind.kind}"'.encode() if hasattr(kind, "kind") else b"" for kind in kinds]


def _first_event(lines: Iterable[bytes]) -> Event | None:
    """Return the event of the first line that can be read."""
    return next((event for line in lines if (event := _parse_line(line))), None)


def _parse_line(line: bytes) -> Event | None:
    return from_json(line) if len(line) <= _MAX_LINE_BYTES else None


def _read_lines(path: Path, offset: int, limit: int) -> tuple[list[bytes], int]:
    """Return the whole lines of the next `limit` bytes at most, and the next offset."""
    if not os.path.lexists(path):
        return [], offset
    with open_file(path) as file:
        file.seek(offset)
        data = file.read(limit)
    end = data.rfind(b"\n") + 1
    if not end and len(data) == limit:  # a part of a line that is too long
        return [], offset + limit
    return data[:end].split(b"\n"), offset + end


def _blocks_backwards(path: Path) -> Iterator[list[bytes]]:
    """Yield the whole lines of the file in blocks, the last block first."""
    if not os.path.lexists(path):
        return
    with open_file(path) as file:
        start, rest, is_whole = file.seek(0, os.SEEK_END), b"", False
        while start:
            end, start = start, max(0, start - _BLOCK_BYTES)
            file.seek(start)
            data = file.read(end - start) + rest
            if not is_whole:  # what follows the last newline is half a line
                data, newline, _half = data.rpartition(b"\n")
                if not (is_whole := bool(newline)):
                    continue
            if start:
                # The first line began before. Of a line that is too long keep so much that it
                # stays too long.
                first, newline, data = data.partition(b"\n")
                rest = first[: _MAX_LINE_BYTES + 1]
                if not newline:
                    continue
            yield data.split(b"\n")
