"""The package's log: the logger `jetson_ft` and those below it (`logging.getLogger(__name__)`).

It holds what the program works around without a message to a person. As a library the package
sends it nowhere; the command line sends it to stderr with `--debug`, a run's worker to `log.txt`.
"""

from __future__ import annotations

import logging
import os

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
