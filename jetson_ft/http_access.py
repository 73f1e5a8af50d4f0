"""What the page and the API check alike: hosts, origins, secrets, rates; and their server."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _

if TYPE_CHECKING:
    import uvicorn
    from starlette.datastructures import Headers


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


def is_equal(text: str, secret: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(text.encode(errors="replace"), secret.encode())


def is_known_host(host: str, names: Iterable[str]) -> bool:
    """Return whether `Host` is an address, localhost or one of the names, on any port."""
    name = re.sub(r":\d*$", "", host.strip().lower())
    if not name:
        return False
    if name == "localhost" or name in {known.lower() for known in names}:
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_cross_origin(headers: Headers) -> bool:
    """Return whether a browser marks the request as another site's."""
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return True
    scheme, separator, host = headers.get("origin", "").partition("://")
    return bool(scheme) and (not separator or host.lower() != headers["host"].lower())


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _name, address = addresses[0]
        # With the protocol, asyncio sets TCP_NODELAY: without it a response takes 40 ms longer.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise UserError(
            _("This address can't be listened on: {error}."),
            f"{host}:{port}",
            _("Choose another port (--port {free}), or end the program that uses this one."),
            error=error.strerror or str(error),
            free=port + 1,
        ) from error
    return listener


def make_server(app: Any, greet: Callable[[], None], **options: Any) -> uvicorn.Server:
    """Return uvicorn's server of an application.

    Args:
        greet: called once the server handles Ctrl-C, which ends it cleanly from then on.
        options: more of `uvicorn.Config`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def main_loop(self) -> None:
            greet()
            await super().main_loop()

    # Ctrl-C waits no longer than this for replies; uvicorn's errors about them are dropped.
    options |= {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 2}
    server = Server(uvicorn.Config(app, **options))
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
    return server


def host_of_address(address: str) -> str:
    """Return the host of HOST or HOST:PORT; refuse other texts with a `UserError`."""
    match = re.fullmatch(r"([\w.-]+|\[[\da-f:.]+])(?::(\d{1,5}))?", address, re.ASCII | re.I)
    host, port = match.groups() if match else ("", None)
    with suppress(ValueError):
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
        if host and 0 < int(port or 80) < 1 << 16:
            return str(host)
    raise UserError(
        _("{address!r} is not the address of a server."),
        "--reached-as (JETSON_FT_REACHED_AS)",
        _("Give HOST or HOST:PORT; an IPv6 address needs brackets, as in [fd00::1]:7860."),
        address=address,
    )
