"""The page as an application: a Gradio page for each language, the routes, access control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jetson_ft import i18n
from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import UserError, _
from jetson_ft.webui import api
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.fragments import SORTS
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.limits import costly
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.security import AccessMiddleware, AccessPolicy
from jetson_ft.webui.tabs import chat, device, train
from jetson_ft.webui.theme import head, theme

_MAX_QUEUED = 32  # calls of Gradio that wait, each with up to a megabyte; others get 503

# What Gradio's script requests. Its other routes serve files, forward requests to any address, or
# start functions past the queue.
_GRADIO_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|(assets|static|svelte)/.+)"
    r"|/gradio_api/(queue/(join|data)|cancel|reset|upload|upload_progress|heartbeat/\w+|app_id"
    r"|startup-events)"
)


def make_app(runs: Path, policy: AccessPolicy) -> Any:
    """Return the page as an ASGI application."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(api.router(runs))
    app.add_exception_handler(UserError, api.error_response)
    app.mount("/static", StaticFiles(directory=Path(__file__).with_name("static")))
    client, doctor = ChatClient(runs, costly), device.Doctor(runs)
    for language in i18n.languages():
        blocks = _build(Locale(language), runs, client, doctor, policy.allowed)
        blocks.has_launched = True  # Gradio checks the paths in requests only then
        blocks.api_open = False  # no call passes the queue, whose limits it would escape
        # Else each queue polls a thousand times per second: 7 % of a core for an idle page. These
        # are Gradio's own values for Windows.
        queue = blocks._queue
        queue.max_size = _MAX_QUEUED
        queue.sleep_when_free, queue.progress_update_sleep_when_free = 0.05, 0.1
        gr.mount_gradio_app(
            app, blocks, f"/{language}", theme=theme(), head=head(), footer_links=[],
            run_history=False, show_error=True, max_file_size=policy.upload_bytes,
        )  # fmt: skip
        mount: Any = app.routes[-1]
        mount.app = _UsedRoutes(mount.app)
    return AccessMiddleware(app, policy)


class _UsedRoutes:
    """Pass the requests of Gradio's script to Gradio; respond to all others with 404."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or _GRADIO_ROUTES.fullmatch(path):
            await self.app(scope, receive, send)
        else:
            await Response(status_code=404)(scope, receive, send)


def _build(
    t: Locale, runs: Path, client: ChatClient, doctor: device.Doctor, allowed: AllowedPaths
) -> Any:
    """Return the Gradio page in one language: a head, and a tab for each task."""
    with gr.Blocks(title="jetson-ft", analytics_enabled=False) as page:
        locales = [Locale(other) for other in i18n.languages()]
        gr.HTML(render("head.jinja", t, locales=locales), apply_default_css=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(t(_("Train")), id="train"):
                train.build(t, runs, page, tabs, allowed)
            with gr.Tab(t(_("Runs")), id="runs"):
                gr.HTML(render("run_page.jinja", t, SORTS=SORTS), apply_default_css=False)
            with gr.Tab(t(_("Chat")), id="chat") as tab:
                chat.build(t, runs, client, page, tab, allowed)
            with gr.Tab(t(_("Device")), id="device") as tab:
                device.build(t, doctor, tab)
    return page
