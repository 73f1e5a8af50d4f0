"""Locks of files: they show that a process lives.

A lock (flock) shows it, and a process number doesn't: a lock works across containers, and after a
power cut it is free.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from jetson_ft.files import disk_errors


def lock(path: Path, timeout: float = 0.0) -> IO[bytes] | None:
    """Take the lock file, until the returned file is closed; None: another process has it.

    Try for `timeout` seconds: `Run.is_locked` takes a free lock for a moment, to test it.
    """
    with disk_errors(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        file = open(os.open(path, flags, 0o666), "ab")  # noqa: SIM115 - held open on purpose
    deadline = time.monotonic() + timeout
    while not try_lock(file):
        if time.monotonic() >= deadline:
            file.close()
            return None
        time.sleep(0.01)
    return file


def try_lock(file: IO[bytes], shared: bool = False) -> bool:
    """Take a flock without waiting; return whether that worked.

    Args:
        shared: to test the lock: two tests at the same time don't see each other.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
