"""Limits of what clients of the page can make the server do."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
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


class RateLimit:
    """A token bucket for each address: `burst` requests at once, `per_second` in the long run.

    The table is bounded: the address that was seen longest ago is dropped.
    """

    def __init__(self, burst: float, per_second: float, max_addresses: int = 4096) -> None:
        self._burst, self._per_second, self._max_addresses = burst, per_second, max_addresses
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, since when

    def take(self, address: str, count: float = 1.0) -> bool:
        """Take tokens out of the address's bucket; return whether it had that many."""
        tokens = self._tokens(address)
        self._buckets[address] = tokens - (count if tokens >= count else 0.0), time.monotonic()
        self._buckets.move_to_end(address)
        if len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)
        return tokens >= count

    def seconds_left(self, address: str, count: float = 1.0) -> float:
        """Return the seconds until the address can take tokens; 0: now."""
        return max(0.0, (count - self._tokens(address)) / self._per_second)

    def _tokens(self, address: str) -> float:
        tokens, since = self._buckets.get(address, (self._burst, 0.0))
        return min(self._burst, tokens + (time.monotonic() - since) * self._per_second)


def client_address(client: tuple[str, int] | None) -> str:
    """Return the address of `scope["client"]`; of IPv6 the network (/64), which one client has."""
    host = client[0] if client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
