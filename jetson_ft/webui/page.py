"""The page as an application: a Gradio page for each language, the routes, access control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jetson_ft import i18n
from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import UserError, _
from jetson_ft.webui import api
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.compression import CompressionMiddleware, changed
from jetson_ft.webui.fragments import SORTS
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.limits import costly
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.security import AccessMiddleware, AccessPolicy
from jetson_ft.webui.tabs import chat, device, inside, train
from jetson_ft.webui.theme import STATIC, STATIC_FOLDER, content_hash, head, theme

_MAX_QUEUED = 32  # calls of Gradio that wait, each with up to a megabyte; others get 503

# What Gradio's script requests. Its other routes serve files, forward requests to any address, or
# start functions past the queue.
_GRADIO_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|(assets|static|svelte)/.+)"
    r"|/gradio_api/(queue/(join|data)|cancel|reset|upload|upload_progress|app_id|startup-events)"
)
# The script of the Inside tab, and its style.
_DRAWING = f"/static/inside-{content_hash(inside.DRAWING_FOLDER)}"
# Gradio's stream from each open page, to notice when it is closed. A browser opens six connections
# to a host, so the seventh page would wait for ever: the page reports its end instead (shell.js).
_HEARTBEAT = re.compile(r"/gradio_api/heartbeat/\w+")
_MAX_SESSIONS = 200  # whose components Gradio keeps; those of closed pages are dropped at once


def make_app(runs: Path, policy: AccessPolicy) -> Any:
    """Return the page as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(api.router(runs))
    app.include_router(device.router(runs))
    app.add_exception_handler(UserError, api.error_response)
    app.mount(STATIC, StaticFiles(directory=STATIC_FOLDER))
    app.mount(_DRAWING, StaticFiles(directory=inside.DRAWING_FOLDER))
    client = ChatClient(runs, costly)
    app.include_router(inside.router(runs, client, policy.allowed))
    pages = []
    for language in i18n.languages():
        t = Locale(language)
        blocks = _build(t, runs, client, policy.allowed)
        pages.append(blocks)
        blocks.has_launched = True  # Gradio checks the paths in requests only then
        blocks.api_open = False  # no call passes the queue, whose limits it would escape
        blocks.state_session_capacity = _MAX_SESSIONS
        # Else each queue polls a thousand times per second: 7 % of a core for an idle page. These
        # are Gradio's own values for Windows.
        queue = blocks._queue
        queue.max_size = _MAX_QUEUED
        queue.sleep_when_free, queue.progress_update_sleep_when_free = 0.05, 0.1
        gr.mount_gradio_app(
            app, blocks, f"/{language}", theme=theme(), footer_links=[], run_history=False,
            show_error=True, max_file_size=policy.upload_bytes,
        )  # fmt: skip
        mount: Any = app.routes[-1]
        # How to call each function from a program: 70 % of the document, for routes that are off.
        mount.app.page_api_info[("", False)] = {"named_endpoints": {}, "unnamed_endpoints": {}}
        mount.app = _GradioPage(mount.app, t)

    @app.post("/closed/{session}")
    def close_session(session: str) -> Response:
        """Stop what a closed page has asked for, and forget it."""
        client.stop(session)
        for blocks in pages:
            blocks.state_holder.session_data.pop(session, None)
        return Response(status_code=204)

    return AccessMiddleware(CompressionMiddleware(app), policy)


class _GradioPage:
    """One language's page: Gradio's, under a head of our own, with the routes that it uses.

    Requests for its other routes get 404.
    """

    def __init__(self, app: ASGIApp, t: Locale) -> None:
        self.app = app
        locales = [Locale(other) for other in i18n.languages()]
        self._tag = t.tag.encode()
        self._head = head(t).encode()
        self._header = render("header.jinja", t, locales=locales).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and _HEARTBEAT.fullmatch(path):
            await Response(status_code=204)(scope, receive, send)
        elif scope["type"] == "http" and not _GRADIO_ROUTES.fullmatch(path):
            await Response(status_code=404)(scope, receive, send)
        elif scope["type"] == "http" and path == "/":
            await self.app(scope, receive, changed(send, re.compile("text/html"), self._complete))
        else:
            await self.app(scope, receive, send)

    def _complete(self, start: Message, body: bytes) -> bytes:
        """Return Gradio's document with our head, and our header above its page."""
        body = body.replace(b'lang="en"', b'lang="%s"' % self._tag, 1)
        body = body.replace(b"<head>", b"<head>" + self._head, 1)
        body = body.replace(b"<gradio-app", self._header + b"<gradio-app", 1)
        MutableHeaders(scope=start)["Content-Length"] = str(len(body))
        return body


def _build(t: Locale, runs: Path, client: ChatClient, allowed: AllowedPaths) -> Any:
    """Return the Gradio page in one language: a tab for each task."""
    with (
        gr.Blocks(title="jetson-ft", analytics_enabled=False) as page,
        gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs,
    ):
        with gr.Tab(t(_("Train")), id="train", elem_id="train-tab"):
            train.build(t, runs, page, tabs, allowed)
        with gr.Tab(t(_("Runs")), id="runs", elem_id="runs-tab"):
            gr.HTML(render("run_page.jinja", t, SORTS=SORTS), apply_default_css=False)
        with gr.Tab(t(_("Chat")), id="chat", elem_id="chat-tab") as tab:
            chat.build(t, runs, client, tab, allowed)
        with gr.Tab(t(_("Inside")), id="inside", elem_id="inside-tab"):
            inside.build(_DRAWING)
        with gr.Tab(t(_("Device")), id="device", elem_id="device-tab"):
            device.build()
        page.unload(lambda: None)  # Gradio's script then requests /heartbeat, see `_HEARTBEAT`
    return page
