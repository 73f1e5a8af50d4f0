"""The page's server: the doors, then the routes, then one Gradio page in each language."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jetson_ft.errors import UserError
from jetson_ft.runs import jobs, processes
from jetson_ft.runs.parlour import Parlour
from jetson_ft.webui.doors import Doors, Rules
from jetson_ft.webui.words import LANGUAGES

_SCRIPTS = """<link rel="stylesheet" href="/static/page.css">
<script src="/static/page.js" defer></script>"""


def make_app(runs: Path, rules: Rules) -> Any:
    """The whole page as an ASGI application."""
    from fastapi import FastAPI
    from fastapi.staticfiles import StaticFiles

    from jetson_ft.webui import page, routes
    from jetson_ft.webui.device import Doctor
    from jetson_ft.webui.library import gr

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(routes.router(runs))
    app.add_exception_handler(UserError, routes.tell)
    parlour, doctor = Parlour(runs), Doctor(runs)
    app.mount("/static", StaticFiles(directory=page.STATIC))
    for language in LANGUAGES:
        made = page.build(language, runs, parlour, doctor)
        made.has_launched = True  # Gradio checks the paths in requests only then
        _calm(made._queue)
        gr.mount_gradio_app(
            app, made, f"/{language}", theme=page.theme(), head=_SCRIPTS, footer_links=[],
            run_history=False, show_error=True, max_file_size=rules.upload_bytes,
        )  # fmt: skip
    return Doors(app, rules)


def _calm(queue: Any) -> None:
    """Else each queue looks for work a thousand times a second: 7 % of a core for a page nobody
    looks at. These are Gradio's own values for Windows."""
    queue.sleep_when_free, queue.progress_update_sleep_when_free = 0.05, 0.1


def serve(
    runs: Path, host: str, port: int, host_names: tuple[str, ...], reached_as: str = ""
) -> None:
    """Serves until it is told to end; prints the link to open, with the token if one is needed.

    Args:
        reached_as: HOST or HOST:PORT for the link, where browsers don't reach it as `host`: in a
            container, whose own address nobody outside knows.

    Raises:
        UserError: the address can't be served on.
    """
    if reached_as:
        host_names = (*host_names, urlsplit(f"//{reached_as}").hostname or "")
    rules = Rules("" if is_loopback(host) else secrets.token_hex(16), host_names)
    door = _listen(host, port)
    import uvicorn

    app = make_app(runs, rules)
    print(f"open: {link(host, door.getsockname()[1], rules.token, reached_as)}", flush=True)
    if rules.token:
        print("Whoever has this link can train and chat here; nobody else gets in.", flush=True)
    else:
        print("From another machine: --host 0.0.0.0 (make webui HOST=0.0.0.0).", flush=True)
    for run in jobs.resumable(runs)[:3]:
        how = f"Resume on the page, or jetson-ft train --resume {run.name}"
        print(f"{run.name} can go on where it stopped: {how}", flush=True)
    # Ctrl-C waits no longer than this for pages that stay open; of being cut off they say much.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    server.run([door])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Before the page is built, so that a taken port is told at once."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(kind, socket.SOCK_STREAM)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(place)
        door.listen(128)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The page can't be served there: {getattr(error, 'strerror', None) or error}.",
            f"{host}:{port}",
            "Choose another port (--port 7861), or end the program that has this one.",
        ) from error
    return door


def link(host: str, port: int, token: str, reached_as: str = "") -> str:
    """What to open: of all addresses, the one that others in the network reach."""
    if not reached_as:
        reached_as = _own_address() if host in ("0.0.0.0", "::") else host  # noqa: S104
        reached_as = f"[{reached_as}]" if ":" in reached_as else reached_as
    if urlsplit(f"//{reached_as}").port is None:
        reached_as = f"{reached_as}:{port}"
    return f"http://{reached_as}/" + (f"?token={token}" if token else "")


def _own_address() -> str:
    """This machine's address towards others: as one that stands for all of them sees it."""
    try:
        return processes.own_address("192.0.2.1")  # RFC 5737; nothing is sent
    except UserError:  # no network
        return "127.0.0.1"
