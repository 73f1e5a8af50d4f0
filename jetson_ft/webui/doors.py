"""Who may come in: every request to the page passes through here first, in this order.

A foreign `Host` is a page that had its name pointed at this machine (DNS rebinding): 400.
A request that changes something and comes from another site's page: 403. More bytes than an
upload may have: 413. Beyond loopback, nobody without the token: 401. `/healthz` alone needs none.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from jetson_ft.webui.words import Words, asked

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_YEAR = 365 * 24 * 3600

Messages = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Rules:
    """What the doors go by."""

    token: str = ""  # nothing: no login, for loopback alone
    host_names: tuple[str, ...] = ()  # besides IP addresses and localhost
    upload_bytes: int = 2 * 2**30


class Doors:
    """ASGI middleware around the whole page, websockets included."""

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Any, receive: Messages, send: Send) -> None:
        """Answers itself, or lets the request through."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        answer = self._refusal(scope)
        if answer is None:
            await self.app(scope, self._counted(receive), send)
        elif scope["type"] == "http":
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Any) -> Response | None:
        """The answer to a request that doesn't get through."""
        headers = Headers(scope=scope)
        refusal = _refuses(scope["path"], headers)
        if not is_known_host(headers.get("host", ""), self.rules.host_names):
            return refusal(
                "This page doesn't answer to that name. Use the machine's IP address, or start it "
                "with `--host-name NAME`.",
                400,
            )
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS
        if changes and is_cross_origin(headers):
            return refusal("Requests from other sites are refused.", 403)
        if int(headers.get("content-length") or 0) > self.rules.upload_bytes:
            return refusal(_too_large(self.rules.upload_bytes), 413)
        if scope["path"] == "/healthz":
            return PlainTextResponse("ok")
        return self._without_token(scope, headers) if self.rules.token else None

    def _without_token(self, scope: Any, headers: Headers) -> Response | None:
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if self._is_token(query.pop("token", "")):
            return self._let_in(scope, query)
        cookie = cookie_parser(headers.get("cookie", "")).get(_cookie_name(headers), "")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(cookie) or self._is_token(bearer):
            return None
        return HTMLResponse(_LOGIN, 401, {"Cache-Control": "no-store"})

    def _is_token(self, said: str) -> bool:
        return hmac.compare_digest(said.encode(), self.rules.token.encode())

    def _let_in(self, scope: Any, query: dict[str, str]) -> Response:
        """Remembers the token in a cookie, and takes it out of the address.

        `lax`: with `strict`, whoever clicks the link in a mail or a web terminal would not be let
        in. Posts from elsewhere are refused whatever cookie they bring.
        """
        there = scope["path"] + (f"?{urlencode(query)}" if query else "")
        answer = RedirectResponse(there, 303)
        answer.set_cookie(
            _cookie_name(Headers(scope=scope)), self.rules.token, max_age=_YEAR,
            httponly=True, samesite="lax", secure=scope.get("scheme") in ("https", "wss"),
        )  # fmt: skip
        return answer

    def _counted(self, receive: Messages) -> Messages:
        """`receive` for bodies that don't tell their length."""
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body") or b"")
            if seen > self.rules.upload_bytes:
                return {"type": "http.disconnect"}
            return message

        return counted


def is_known_host(host: str, names: Iterable[str]) -> bool:
    """Whether `Host` is an address, localhost, or one of the names. Ports don't matter."""
    name = _without_port(host)
    if name == "localhost" or name in {known.lower() for known in names}:
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rsplit(":", 1)[0] if ":" in host else host


def is_cross_origin(headers: Headers) -> bool:
    """Whether a browser says that another site's page is asking."""
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return True
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()


def _refuses(path: str, headers: Headers) -> Callable[[str, int], Response]:
    """Makes plain answers in the visitor's language."""
    return lambda text, status: PlainTextResponse(Words(asked(path, headers)).said(text), status)


def _cookie_name(headers: Headers) -> str:
    """One for each port: a machine's cookies are the same for all of its ports."""
    port = headers.get("host", "").rpartition(":")[2]
    return f"jetson-ft-{port}" if port.isdigit() else "jetson-ft"


def _too_large(limit: int) -> str:
    return f"That is more than an upload may have ({limit / 2**20:,.0f} MiB)."


_LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>jetson-ft</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 26rem; margin: 15vh auto;
    padding: 0 1rem }
  input, button { font: inherit; padding: .5rem .75rem; border-radius: .5rem;
    border: 1px solid #8a8f98 }
  input { width: 100%; box-sizing: border-box; margin-bottom: .75rem }
  button { background: #3f7d20; border-color: #3f7d20; color: #fff }
  @media (prefers-color-scheme: dark) { body, input { background: #16181c; color: #e6e8eb } }
</style>
<h1>jetson-ft</h1>
<p>The token stands in the terminal that started this page.<br>
<span lang="zh-Hans">令牌显示在启动本页面的终端里。</span></p>
<form><input name="token" type="password" aria-label="token / 令牌" autofocus required>
<button>Open / 打开</button></form></html>
"""
