"""The machine's place for one running job, first come first served."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import IO

from jetson_ft.paths import cache_dir
from jetson_ft.runs.rundir import lock, try_lock


class Slot:
    """A place in the queue for the slot.

    Who waits holds the lock of a ticket file named by time; the oldest living ticket may
    try for the slot.
    """

    def __init__(self, since: float) -> None:
        """Joins the queue behind everybody who asked before `since` (seconds since 1970)."""
        self._folder = cache_dir("queue")
        self._name = f"{int(since * 1e6):020d}-{uuid.uuid4().hex}"
        # Locked first and shown then: an unlocked ticket is taken for a dead man's.
        hidden = self._folder / f".{self._name}"
        self._ticket = lock(hidden)
        hidden.replace(self._folder / self._name)

    def try_take(self, run: Path) -> IO[bytes] | None:
        """The slot's lock file when it is this ticket's turn and the slot is free.

        It tells others for which run's folder it was taken.
        """
        if self._is_anybody_before():
            return None
        held = lock(self._folder / "slot")
        if held:
            held.truncate(0)
            held.write(os.fsencode(run.absolute()))
            held.flush()
            self.leave()
        return held

    def leave(self) -> None:
        """Gives the ticket back."""
        (self._folder / self._name).unlink(missing_ok=True)
        if self._ticket:
            self._ticket.close()
            self._ticket = None

    def _is_anybody_before(self) -> bool:
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


def holder() -> Path | None:
    """Folder of the run that has the machine's slot; None: it is free."""
    path = cache_dir("queue") / "slot"
    held = lock(path)
    if held:
        held.close()
        return None
    return Path(os.fsdecode(path.read_bytes()))
