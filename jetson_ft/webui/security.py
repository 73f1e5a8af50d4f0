"""Access control: ASGI middleware that checks every request to the page, in this order.

A foreign `Host` (DNS rebinding): 400. A request that changes something, sent by another site's
page: 403. A body over the upload limit: 413. Where a token is set, a request without it: 401;
`/healthz` alone needs none.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jetson_ft import i18n
from jetson_ft.errors import _
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.render import Locale, render, request_language

_YEAR = 365 * 24 * 3600  # seconds


@dataclass(frozen=True)
class AccessPolicy:
    """What `AccessMiddleware` checks requests against, and the page their arguments."""

    token: str = ""  # empty: no login; for loopback only
    host_names: tuple[str, ...] = ()  # accepted besides IP addresses and localhost
    upload_bytes: int = 2 * 2**30
    allowed: AllowedPaths = EVERY_PATH  # the files that visitors may name


class AccessMiddleware:
    """Check HTTP requests and websockets before they reach `app`."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it to `app`."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        response = self._check(scope)
        if response is None:
            await self.app(scope, self._limited(receive), send)
        elif scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _check(self, scope: Scope) -> Response | None:
        """Return the response to a request that does not reach `app`."""
        headers = Headers(scope=scope)
        t = Locale(request_language(scope["path"], headers))
        if not is_known_host(headers.get("host", ""), self.policy.host_names):
            refusal = _(
                "This page does not answer to that host name. Use the machine's IP address, or "
                "start the page with `--host-name NAME`."
            )
            return PlainTextResponse(t(refusal), 400)
        reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS")
        if not reads and is_cross_origin(headers):
            return PlainTextResponse(t(_("Requests from other sites are refused.")), 403)
        limit = self.policy.upload_bytes
        if int(headers.get("content-length") or 0) > limit:
            refusal = _("The upload is larger than {limit:,.0f} MiB.")
            return PlainTextResponse(t(refusal, limit=limit / 2**20), 413)
        if scope["path"] == "/healthz":
            return PlainTextResponse("ok")
        return self._check_token(scope, headers) if self.policy.token else None

    def _check_token(self, scope: Scope, headers: Headers) -> Response | None:
        # The cookie's name has the port: a machine's cookies are shared by all of its ports.
        port = headers["host"].rpartition(":")[2]
        cookie_name = f"jetson-ft-{port}" if port.isdigit() else "jetson-ft"
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if self._is_token(query.pop("token", "")):
            # Store the token in the cookie and redirect to the address without it.
            address = scope["path"] + (f"?{urlencode(query)}" if query else "")
            response = RedirectResponse(address, 303)
            # With `strict`, a link opened from a mail or a web terminal would not log in. Posts
            # from other sites are refused with any cookie.
            response.set_cookie(
                cookie_name, self.policy.token, max_age=_YEAR, httponly=True, samesite="lax",
                secure=scope.get("scheme") in ("https", "wss"),
            )  # fmt: skip
            return response
        cookie = cookie_parser(headers.get("cookie", "")).get(cookie_name, "")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(cookie) or self._is_token(bearer):
            return None
        locales = [Locale(language) for language in i18n.languages()]
        login = render("login.jinja", locales[0], locales=locales)
        return HTMLResponse(login, 401, {"Cache-Control": "no-store"})

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.policy.token.encode())

    def _limited(self, receive: Receive) -> Receive:
        """Wrap `receive` to disconnect a body without a declared length at the upload limit."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body") or b"")
            if received > self.policy.upload_bytes:
                return {"type": "http.disconnect"}
            return message

        return limited


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
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()
