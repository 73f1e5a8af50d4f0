"""The package's log: the logger `jetson_ft` and those below it (`logging.getLogger(__name__)`).

It holds what the program works around without a message to a person. As a library the package
sends it nowhere; the command line sends it to stderr with `--debug`, a run's worker to `log.txt`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any

DEBUG = "JETSON_FT_DEBUG"  # environment variable; not empty: as with --debug


def is_debug() -> bool:
    """Return whether tracebacks and the log are wanted."""
    return bool(os.environ.get(DEBUG))


def log_to_stderr() -> None:
    """Send the package's log to stderr, every level; a second call changes nothing."""
    logger = logging.getLogger("jetson_ft")
    logger.setLevel(logging.DEBUG)
    if not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
        logger.addHandler(handler)


class _BestEffortFile(io.FileIO):
    """A file that drops what can't be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data).cast("B"))


def ignore_write_errors() -> None:
    """Make stdout and stderr, which are `log.txt`, drop what a full disk doesn't take.

    Else a line of the log would end a run, or change its exit code when Python flushes at its end.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        buffer = io.BufferedWriter(_BestEffortFile(number, "wb", closefd=False))
        text = io.TextIOWrapper(buffer, "utf-8", "backslashreplace", line_buffering=True)
        setattr(sys, name, text)
