"""What is compressed, what is kept, and what passes as it comes."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brotli
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from jetson_ft.webui import page
from jetson_ft.webui.compression import CompressionMiddleware
from jetson_ft.webui.security import AccessPolicy
from jetson_ft.webui.theme import STATIC

TEXT = "a long text. " * 1000
SCRIPT = "/en/assets/index-abc.js"


@pytest.fixture
def served() -> Iterator[tuple[TestClient, list[str]]]:
    """Return a client, and the paths that have reached the application."""
    reached: list[str] = []

    def answer(request: Any) -> Response:
        reached.append(request.url.path)
        assert "accept-encoding" not in request.headers
        kind = request.url.path
        if kind == "/stream":
            return StreamingResponse(iter(["data: x\n\n"] * 500), media_type="text/event-stream")
        if kind == "/zip":
            return Response(b"z" * 5000, media_type="application/zip")
        if kind == "/large":
            return PlainTextResponse("x" * (2**22 + 1))
        if kind == "/short":
            return JSONResponse({"short": True})
        status = 404 if "missing" in kind else 200
        return Response(TEXT, status, media_type="text/javascript")

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    with TestClient(CompressionMiddleware(app)) as client:
        yield client, reached


def raw(client: TestClient, path: str, accepted: str, **headers: str) -> tuple[Any, bytes]:
    """Return the response, and its body as it was sent."""
    headers["Accept-Encoding"] = accepted
    with client.stream("GET", path, headers=headers) as response:
        return response, b"".join(response.iter_raw())


@pytest.mark.parametrize(
    ("accepted", "encoding", "decode"),
    [
        ("gzip, deflate, br", "br", brotli.decompress),
        ("gzip;q=1.0", "gzip", gzip.decompress),
        ("deflate", None, bytes),
        ("", None, bytes),
    ],
)
def test_the_best_encoding_that_is_accepted_is_used(
    served: Any, accepted: str, encoding: str | None, decode: Any
) -> None:
    for path in ("/text", SCRIPT, SCRIPT):  # the last one is kept
        response, body = raw(served[0], path, accepted)
        assert response.headers.get("content-encoding") == encoding
        assert response.headers["content-length"] == str(len(body))
        assert response.headers["vary"] == "Accept-Encoding"
        assert decode(body).decode() == TEXT


def test_files_with_a_hash_are_kept_here_and_in_the_browser(served: Any) -> None:
    client, reached = served
    for path in (SCRIPT, SCRIPT.replace("/en/", "/zh_CN/")):  # both languages have the same files
        response, _body = raw(client, path, "br")
        assert response.headers["cache-control"].endswith("immutable")
    assert reached == [SCRIPT]
    for _again in range(2):
        response, _body = raw(client, "/en/assets/missing.js", "br")
        assert response.status_code == 404 and "cache-control" not in response.headers
    assert reached[1:] == ["/en/assets/missing.js"] * 2


def test_other_spellings_of_a_path_are_not_kept(served: Any) -> None:
    client, reached = served
    for _again in range(2):
        for path in ("/en/assets//index-abc.js", "/en/assets/%2e/index-abc.js"):
            response, _body = raw(client, path, "br")
            assert response.status_code == 200 and "cache-control" not in response.headers
    assert len(reached) == 4


@pytest.mark.parametrize("path", ["/stream", "/zip", "/large", "/short"])
def test_streams_and_what_gains_nothing_pass_as_they_come(served: Any, path: str) -> None:
    response, _body = raw(served[0], path, "br, gzip")
    assert response.status_code == 200 and "content-encoding" not in response.headers


def test_parts_of_a_file_are_not_compressed(served: Any) -> None:
    client, _reached = served
    with pytest.raises(AssertionError):  # the request arrives unchanged
        raw(client, "/text", "br", Range="bytes=0-5")


def test_the_start_of_the_server_reaches_the_application(tmp_path: Path) -> None:
    """Gradio's queue begins to work then."""
    started: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.append(scope["type"])

    asyncio.run(CompressionMiddleware(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert started == ["lifespan"]


def test_the_pages_own_files_are_kept_for_good(tmp_path: Path) -> None:
    client = TestClient(page.make_app(tmp_path, AccessPolicy()), base_url="http://localhost")
    for address in (f"{STATIC}/shell.js", f"{STATIC}/shell.css", f"{page._DRAWING}/inside.css"):
        response = client.get(address, headers={"Accept-Encoding": "br"})
        assert response.headers["cache-control"].endswith("immutable")
        assert response.headers["content-encoding"] == "br"
    html = client.get("/en/").text
    assert f'src="{STATIC}/shell.js"' in html
    assert html.index("--tuned:") < html.index("<gradio-app"), "the tokens, before the first paint"
    assert html.index("page-head") < html.index("<gradio-app")
