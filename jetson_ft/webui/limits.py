"""Limits of what clients of the page can make the server do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jetson_ft.errors import UserError, _

MAX_COSTLY = 2  # processes that load torch, for all clients together
_MAX_WAITING = 4  # threads that wait for one; the others are refused at once
_WAIT_SECONDS = 10.0

_running = threading.BoundedSemaphore(MAX_COSTLY)
_admitted = threading.BoundedSemaphore(MAX_COSTLY + _MAX_WAITING)


class BusyError(UserError):
    """The server does too much already; the same request can succeed later."""


@contextmanager
def costly() -> Iterator[None]:
    """Hold one of the places for work that takes gigabytes of memory or minutes.

    Raises:
        BusyError: no place became free within a few seconds.
    """
    if not _admitted.acquire(blocking=False):
        raise _busy()
    try:
        if not _running.acquire(timeout=_WAIT_SECONDS):
            raise _busy()
        try:
            yield
        finally:
            _running.release()
    finally:
        _admitted.release()


def _busy() -> BusyError:
    what = _("Busy: this machine already works on as many such requests as it can.")
    return BusyError(what, fix=_("Try again in a minute."))
