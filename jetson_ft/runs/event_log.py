"""Append to a run's `events.jsonl`; `event_reader` reads it."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace

from jetson_ft.events import Event, to_json
from jetson_ft.files import disk_errors, is_disk_full
from jetson_ft.runs import contents
from jetson_ft.runs.store import Run

_MAX_WAITING = 200  # events; they must fit into `Run.reserve_space`


class EventLog:
    """Appends events, from any thread; a line is one write, so that two writers never mix.

    While the disk is full, the newest events wait in memory: training goes on without its log until
    a checkpoint can't be written either.

    A context manager, which closes the file; a worker's log stays open until the process ends.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        self._attempt = attempt
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []  # lines, oldest first
        self._path = run.events_file
        with disk_errors(self._path):
            self._file = contents.open_to_append(self._path)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def emit(self, event: Event) -> None:
        """Append an event with the time and the attempt's number."""
        event = replace(event, t=round(time.time(), 3), attempt=self._attempt)
        line = (json.dumps(to_json(event), ensure_ascii=False) + "\n").encode()
        with self._lock, disk_errors(self._path):
            self._waiting.append(line)
            try:
                while self._waiting:
                    self._append(self._waiting[0])
                    del self._waiting[0]
            except OSError as error:
                if not is_disk_full(error):
                    raise
                del self._waiting[:-_MAX_WAITING]

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        # A power cut or a full disk may have left half a line; the event must start a new one.
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that becomes full takes a part and refuses the rest
            line = line[os.write(self._file, line) :]


def emit_once(run: Run, event: Event) -> None:
    """Append an event to the run's current attempt, by a process that emits few."""
    with EventLog(run, run.state_or_derived().attempt) as log:
        log.emit(event)
