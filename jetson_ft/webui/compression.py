"""Compress what a browser loads.

Gradio compresses its scripts in pieces and again for each page, and sends its document as it is.
Here each response is compressed whole, and those of Gradio's scripts and styles are kept. Streams,
which declare no length, and large files pass as they come; docs/decisions/0027 has the sizes.
"""

from __future__ import annotations

import gzip
import posixpath
import re
from collections.abc import Callable

import brotli
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TYPES = re.compile(
    r"text/(html|css|javascript|plain|markdown)|application/(javascript|json)|image/svg\+xml"
)
_MIN_BYTES, _MAX_BYTES = 1000, 2**22  # what fits into one packet gains nothing
# Of Brotli: 7 % smaller than 4 and as fast; 11 is 8 % smaller still and takes 60 times as long.
_QUALITY = 5
# The paths of these files hold a hash of their content (`theme.STATIC`). Gradio sends each
# language's page the same ones.
_HASHED = re.compile(r"/\w+(/assets/.+)|/static/(inside-)?[0-9a-f]{16}/.+")
_FOREVER = "private, max-age=31536000, immutable"


class CompressionMiddleware:
    """Compress the responses of `app`, for clients that accept Brotli or gzip."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._kept: dict[tuple[str, str], tuple[Message, bytes]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else None
        if headers is None or scope["method"] != "GET" or "range" in headers:
            await self.app(scope, receive, send)
            return
        encoding = _encoding(headers.get("accept-encoding", ""))
        path = scope["path"]
        # Of a file's many paths (`a/./b`, `a//b`) only one is kept.
        hashed = _HASHED.fullmatch(path) if posixpath.normpath(path) == path else None
        name = (hashed[1] or hashed[0], encoding) if hashed else None
        if name in self._kept:
            start, body = self._kept[name]
            # Those that see a response change its headers.
            await send({**start, "headers": list(start["headers"])})
            await send({"type": "http.response.body", "body": body})
            return

        def compress(start: Message, body: bytes) -> bytes:
            response_headers = MutableHeaders(scope=start)
            if hashed and start["status"] == 200:
                response_headers["Cache-Control"] = _FOREVER
            if encoding and len(body) >= _MIN_BYTES and "content-encoding" not in response_headers:
                is_brotli = encoding == "br"
                body = brotli.compress(body, quality=_QUALITY) if is_brotli else gzip.compress(body)
                response_headers["Content-Encoding"] = encoding
            response_headers.add_vary_header("Accept-Encoding")
            response_headers["Content-Length"] = str(len(body))
            if name and start["status"] == 200:
                self._kept[name] = {**start, "headers": list(start["headers"])}, body
            return body

        plain = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        await self.app({**scope, "headers": plain}, receive, changed(send, _TYPES, compress))


def changed(
    send: Send, content_type: re.Pattern[str], change: Callable[[Message, bytes], bytes]
) -> Send:
    """Wrap `send` to change whole responses of a declared length, up to 4 MiB.

    Args:
        content_type: matches the beginning of the type; responses of others pass as they come.
        change: returns the body to send, from the start message, whose headers it may change, and
            the body.
    """
    start: Message | None = None
    parts: list[bytes] = []

    async def send_changed(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            is_small = int(headers.get("content-length", _MAX_BYTES + 1)) <= _MAX_BYTES
            if is_small and content_type.match(headers.get("content-type", "")):
                start = message
                return
        elif start and message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = change(start, b"".join(parts))
            await send(start)
            message = {"type": "http.response.body", "body": body}
            start = None
        await send(message)

    return send_changed


def _encoding(accepted: str) -> str:
    """Return the encoding for an `Accept-Encoding`; empty: none."""
    names = [part.partition(";")[0].strip() for part in accepted.split(",")]
    return next((name for name in ("br", "gzip") if name in names), "")
