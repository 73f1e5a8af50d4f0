"""Access control: ASGI middleware that checks every request to the API, in this order.

A foreign `Host` (DNS rebinding): 400. A request that another site's page sends: 403. Where a key is
set, a request without it: 401, and after some wrong ones 429; `/healthz` alone needs none. More
open requests than the server can hold: 429. A body over its limit, also one of undeclared length:
413.
"""

from __future__ import annotations

import asyncio
import re

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jetson_ft.http_access import (
    RateLimit,
    client_address,
    is_cross_origin,
    is_equal,
    is_known_host,
)
from jetson_ft.serve.fields import RequestError

BODY_BYTES = 2**20
_BODY_SECONDS = 30.0  # for a whole body
_OPEN_REQUESTS = 256  # of all clients; each holds a body
_GUESSES = 10, 0.2  # of the key, of one address: at once, and per second in the long run


class AccessMiddleware:
    """Check HTTP requests before they reach `app`.

    Args:
        key: empty: none is needed; for loopback only.
        host_names: accepted as `Host` besides IP addresses and localhost.
        origins: other sites whose pages may send requests.
    """

    def __init__(
        self, app: ASGIApp, key: str, host_names: tuple[str, ...], origins: tuple[str, ...]
    ) -> None:
        self.app, self.key, self.host_names, self.origins = app, key, host_names, origins
        self._guesses = RateLimit(*_GUESSES)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it to `app`."""
        if scope["type"] != "http":  # "lifespan"; websockets have no route
            await self.app(scope, receive, send)
            return
        self._open += 1
        try:
            self._check(scope)
            await self.app(scope, receive, send)
        except RequestError as error:
            await error.response()(scope, receive, send)
        finally:
            self._open -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not is_known_host(headers.get("host", ""), self.host_names):
            message = (
                "This server does not answer to that host name. Use the machine's IP address, or "
                "start it with `--host-name NAME`."
            )
            raise RequestError(400, message)
        if is_cross_origin(headers) and headers.get("origin") not in self.origins:
            raise RequestError(403, "Requests from other sites' pages are refused.")
        if scope["path"] == "/healthz":
            return
        if self.key:
            self._check_key(headers, client_address(scope.get("client")))
        if self._open > _OPEN_REQUESTS:
            raise RequestError(429, "Too many open requests.", retry_after=5)

    def _check_key(self, headers: Headers, address: str) -> None:
        guess = headers.get("authorization", "").removeprefix("Bearer ")
        if is_equal(guess, self.key):  # first: clients behind one router share an address
            return
        if seconds := self._guesses.seconds_left(address):
            message = f"Too many wrong keys. Try again in {int(seconds) + 1} s."
            raise RequestError(429, message, retry_after=int(seconds) + 1)
        if guess:
            self._guesses.take(address)
        message = "Missing or wrong key. Send the one that the server printed when it started."
        raise RequestError(401, message, code="invalid_api_key")


async def read_body(request: Request) -> bytes:
    """Return a request's whole body.

    Raises:
        RequestError: it is too large, or comes too slowly.
    """
    declared = request.headers.get("content-length", "0")
    refusal = RequestError(413, f"The body is larger than {BODY_BYTES:,} bytes.")
    if not re.fullmatch(r"\d{1,18}", declared, re.ASCII):
        raise RequestError(400, "Content-Length is no number.")
    if int(declared) > BODY_BYTES:
        raise refusal

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                raise refusal
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), _BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise RequestError(408, "The body did not arrive in time.") from error
    except ClientDisconnect as error:
        raise RequestError(400, "The client has gone.") from error
