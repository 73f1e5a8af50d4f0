"""Access control: ASGI middleware that checks every request to the page, in this order.

More requests from an address than a page sends: 429. A foreign `Host` (DNS rebinding): 400. A
request that changes something, sent by another site's page: 403. Where a token is set, a request
without it: 401; `/healthz` alone needs none. A body over its limit: 413, before anything parses it;
an upload that would fill the disk: 507.

Responses have headers that keep other sites from framing the page, and never redirect to another
site.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jetson_ft import i18n
from jetson_ft.errors import UserError, _
from jetson_ft.http_access import (
    RateLimit,
    client_address,
    is_cross_origin,
    is_equal,
    is_known_host,
)
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.render import Locale, render, request_language
from jetson_ft.webui.uploads import Incoming

_YEAR = 365 * 24 * 3600  # seconds
_BODY_BYTES = 2**20  # of every request but an upload
_BODY_BYTES_PER_REQUEST = 2**16  # that cost as much as a request
_BODY_SECONDS = 60.0  # without a byte of an expected body
# A page loads a hundred files when it is opened, and polls twice in 2.5 seconds.
_REQUESTS = 500, 50.0  # at once, and per second in the long run, of one address
_OPEN_REQUESTS = 200  # of one address at any time, streams and websockets included
_GUESSES = 10, 0.2  # of the token
_UPLOAD = re.compile(r"/\w+/gradio_api/upload/?")
_HEADERS = {
    # A model's answer is shown as markdown: its images and styles must not reach other machines.
    # Gradio's scripts are inline, and evaluate the events' `js`.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "X-Frame-Options": "SAMEORIGIN",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # `request_language` reads the page's own
}
_PRIVATE = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class AccessPolicy:
    """What `AccessMiddleware` checks requests against, and the page their arguments."""

    token: str = ""  # empty: no login; for loopback only
    host_names: tuple[str, ...] = ()  # accepted besides IP addresses and localhost
    upload_bytes: int = 2 * 2**30
    allowed: AllowedPaths = EVERY_PATH  # the files that visitors may name
    incoming: Incoming | None = None  # where uploads are received; None: nothing is uploaded


class AccessMiddleware:
    """Check HTTP requests and websockets before they reach `app`."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy
        self._requests, self._guesses = RateLimit(*_REQUESTS), RateLimit(*_GUESSES)
        self._open: Counter[str] = Counter()
        # Not the token itself: a wrong cookie, of a tab that is left from an earlier server, is no
        # guess at it.
        self._cookie = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it to `app`."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        address = client_address(scope.get("client"))
        self._open[address] += 1
        try:
            if scope["type"] == "http":
                send = _guarded(scope, send)
            response = self._check(scope, address)
            if response is None and scope["type"] == "http":
                response = await self._pass(scope, receive, send, address)
            elif response is None:
                await self.app(scope, receive, send)
            if response is not None and scope["type"] == "http":
                await response(scope, receive, send)
            elif response is not None:
                await send({"type": "websocket.close", "code": 1008})
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    def _check(self, scope: Scope, address: str) -> Response | None:
        """Return the response to a request that does not reach `app`, by its headers alone."""
        headers = Headers(scope=scope)
        t = Locale(request_language(scope["path"], headers))
        if not self._requests.take(address) or self._open[address] > _OPEN_REQUESTS:
            return _too_many(t, self._requests.seconds_left(address))
        if not is_known_host(headers.get("host", ""), self.policy.host_names):
            refusal = _(
                "This page does not answer to that host name. Use the machine's IP address, or "
                "start the page with `--host-name NAME`."
            )
            return PlainTextResponse(t(refusal), 400)
        reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")
        if not reads and is_cross_origin(headers):
            return PlainTextResponse(t(_("Requests from other sites are refused.")), 403)
        if scope["path"] == "/healthz":
            return PlainTextResponse("ok")
        if self.policy.token and (refused := self._check_token(scope, headers, t, address)):
            return refused
        return None

    def _check_token(
        self, scope: Scope, headers: Headers, t: Locale, address: str
    ) -> Response | None:
        # The cookie's name has the port: a machine's cookies are shared by all of its ports.
        port = headers["host"].rpartition(":")[2]
        cookie_name = f"jetson-ft-{port}" if port.isdigit() else "jetson-ft"
        cookie = cookie_parser(headers.get("cookie", "")).get(cookie_name, "")
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"))
        in_query = dict(query).get("token", "")
        is_known = is_equal(cookie, self._cookie)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        guesses = [text for text in (in_query, bearer) if text]
        if guesses and not is_known:
            if seconds := self._guesses.seconds_left(address, len(guesses)):
                return _too_many(t, seconds)
            wrong = [text for text in guesses if not is_equal(text, self.policy.token)]
            self._guesses.take(address, len(wrong))
            is_known = len(wrong) < len(guesses)
        if is_known and "token" not in dict(query):
            return None
        if is_known:
            # Redirect to the address without the token, and log in by the cookie.
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            local = local_path(scope["path"]) + (f"?{rest}" if rest else "")
            response = RedirectResponse(local, 303, _PRIVATE)
            # With `strict`, a link opened from a mail or a web terminal would not log in. Posts
            # from other sites are refused with any cookie.
            response.set_cookie(
                cookie_name, self._cookie, max_age=_YEAR, httponly=True, samesite="lax",
                secure=scope.get("scheme") in ("https", "wss"),
            )  # fmt: skip
            return response
        locales = [Locale(language) for language in i18n.languages()]
        return HTMLResponse(render("login.jinja", locales[0], locales=locales), 401, _PRIVATE)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, address: str
    ) -> Response | None:
        """Pass the request to `app` with a bounded body; return the response to a refused one."""
        headers = Headers(scope=scope)
        t = Locale(request_language(scope["path"], headers))
        declared = headers.get("content-length", "0")
        if not re.fullmatch(r"\d{1,18}", declared, re.ASCII):
            return Response(status_code=400)
        incoming = self.policy.incoming
        if incoming and scope["method"] == "POST" and _UPLOAD.fullmatch(scope["path"]):
            try:
                await asyncio.to_thread(incoming.prepare)
            except UserError as error:
                return PlainTextResponse(t(error), 503)
            free, limit = incoming.free_bytes(), self.policy.upload_bytes
            refusal = _upload_refusal(t, min(limit, free), free < limit)
            if int(declared) > min(limit, free):
                return refusal
            limited = _limited(receive, min(limit, free), refusal)
            with incoming.receiving(int(declared) or min(limit, free)), suppress(ClientDisconnect):
                await self.app(scope, limited, send)
            return None
        if int(declared) > _BODY_BYTES:
            return _too_large(t)
        if int(declared) or "transfer-encoding" in headers:
            body = await _read(receive)
            if body is None:
                return _too_large(t)
            # What is parsed takes several times its size: many large bodies are a flood too.
            cost = sum(len(part.get("body") or b"") for part in body) / _BODY_BYTES_PER_REQUEST
            if not self._requests.take(address, cost):
                return _too_many(t, self._requests.seconds_left(address, cost))
            receive = _replayed(body, receive)
        await self.app(scope, receive, send)
        return None


def _upload_refusal(t: Locale, limit: int, disk_is_full: bool) -> Response:
    if not disk_is_full:
        refusal = _("The upload is larger than {limit:,.0f} MiB.")
        return PlainTextResponse(t(refusal, limit=limit / 2**20), 413)
    refusal = _(
        "The disk has no room for this upload: an upload may take half of the free space, which "
        "is {limit:,.0f} MiB. Free some space, or start the page with `--runs` on another disk."
    )
    return PlainTextResponse(t(refusal, limit=limit / 2**20), 507)


def _too_large(t: Locale) -> Response:
    refusal = _("The request is larger than {limit:,.0f} MiB.")
    return PlainTextResponse(t(refusal, limit=_BODY_BYTES / 2**20), 413)


def _too_many(t: Locale, seconds: float) -> Response:
    refusal = _("Too many requests. Try again in {seconds} s.")
    whole = int(seconds) + 1
    headers = {"Retry-After": str(whole), **_PRIVATE}
    return PlainTextResponse(t(refusal, seconds=whole), 429, headers)


async def _next(receive: Receive) -> Message:
    """Return the next part of a body; one that stops to come is disconnected."""
    try:
        return await asyncio.wait_for(receive(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        return {"type": "http.disconnect"}


async def _read(receive: Receive) -> list[Message] | None:
    """Return the messages of a whole body; None for one that is too large."""
    messages: list[Message] = []
    length = 0
    while not messages or messages[-1].get("more_body"):
        messages.append(await _next(receive))
        length += len(messages[-1].get("body") or b"")
        if length > _BODY_BYTES:
            return None
    return messages


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """Wrap `receive` to return messages that were read before."""
    left = iter(messages)

    async def replayed() -> Message:
        return next(left, None) or await receive()

    return replayed


def _limited(receive: Receive, limit: int, refusal: Response) -> Receive:
    """Wrap `receive` to end an upload of undeclared length at the limit, with a response."""
    received, is_whole = 0, False

    async def limited() -> Message:
        nonlocal received, is_whole
        message = await (receive() if is_whole else _next(receive))
        received += len(message.get("body") or b"")
        is_whole = not message.get("more_body")
        if received > limit:
            raise HTTPException(refusal.status_code, bytes(refusal.body).decode())
        return message

    return limited


def _guarded(scope: Scope, send: Send) -> Send:
    """Wrap `send` to add headers of security, and to drop a redirect to another site."""
    host = Headers(scope=scope).get("host", "")

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if headers.get("content-type", "").startswith("text/html"):
                headers.setdefault("Cache-Control", "no-store")
            if not stays_on_host(headers.get("location", "/"), host):
                del headers["location"]
                message = {**message, "status": 404}
        await send(message)

    return guarded


def local_path(path: str) -> str:
    """Return a path as a relative address that can't be read as another host's."""
    return quote("/" + path.lstrip("/\\"), safe="/:@!$&'()*+,;=-._~")


def stays_on_host(location: str, host: str) -> bool:
    """Return whether a redirect to `location` stays on the host, however a browser reads it."""
    if re.search(r"[\x00-\x20\x7f\\]", location) or location.startswith("//"):
        return False
    if location.startswith(("/", "?", "#")):
        return True
    try:
        address = urlsplit(location)
    except ValueError:
        return False
    return address.scheme in ("http", "https") and address.netloc.lower() == host.lower()
