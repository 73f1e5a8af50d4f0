"""The machine's slot for one running job, first come, first served."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO

from jetson_ft.errors import UserError
from jetson_ft.files import cache_dir, disk_errors
from jetson_ft.runs.locks import lock, try_lock


def microseconds(seconds: float) -> int:
    """Return a time since 1970 as tickets are named by it."""
    return int(seconds * 1e6)


class QueueTicket:
    """A place in the queue for the slot: a locked file, named by the time `since` (since 1970).

    The oldest ticket that is locked may take the slot.
    """

    def __init__(self, since: float) -> None:
        self._folder = cache_dir("queue")
        self._name = f"{microseconds(since):020d}-{uuid.uuid4().hex}"
        # Locked before it is visible: one without a lock is taken for a dead process's.
        hidden = self._folder / f".{self._name}"
        self._ticket = lock(hidden)
        hidden.replace(self._folder / self._name)

    def try_take(self, run: Path) -> IO[bytes] | None:
        """Return the slot's lock file, with the run's folder in it; None: not yet."""
        if self._has_earlier_ticket():
            return None
        slot = lock(self._folder / "slot")
        if slot:
            try:
                with disk_errors(self._folder):
                    slot.truncate(0)
                    os.write(slot.fileno(), os.fsencode(run.absolute()))
            except UserError:
                slot.close()
                raise
            finally:
                self.cancel()
        return slot

    def cancel(self) -> None:
        """Leave the queue."""
        (self._folder / self._name).unlink(missing_ok=True)
        if self._ticket:
            self._ticket.close()
            self._ticket = None

    def _has_earlier_ticket(self) -> bool:
        for path in sorted(self._folder.glob("[0-9]*-*")):
            if path.name >= self._name:
                return False
            try:
                with open(path, "rb") as file:
                    if not try_lock(file):
                        return True
            except FileNotFoundError:
                continue
            path.unlink(missing_ok=True)  # its owner died waiting
        return False


def waiting() -> list[int]:
    """Return the times of request of all that wait for the slot, in microseconds since 1970."""
    times = []
    for path in cache_dir("queue").glob("[0-9]*-*"):
        with suppress(OSError, ValueError), open(path, "rb") as file:
            if not try_lock(file, shared=True):  # else its owner died waiting
                times.append(int(path.name.partition("-")[0]))
    return times


def running_run() -> Path | None:
    """Return the folder of the run that has the machine's slot; None: it is free."""
    path = cache_dir("queue") / "slot"
    if not path.exists():
        return None
    with disk_errors(path), open(path, "rb") as slot:
        return None if try_lock(slot, shared=True) else Path(os.fsdecode(slot.read()))
