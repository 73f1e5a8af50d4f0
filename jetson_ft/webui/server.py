"""Serve the page, with a token unless only this machine can reach it."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import printable
from jetson_ft.http_access import host_of_address, is_loopback, listen, make_server
from jetson_ft.runs import processes
from jetson_ft.runs.interrupted import take_up_runs
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.security import AccessPolicy
from jetson_ft.webui.uploads import Incoming


def serve(
    runs: Path,
    host: str,
    port: int,
    host_names: tuple[str, ...],
    reached_as: str = "",
    allowed: tuple[Path, ...] = (),
) -> None:
    """Serve the page until the process is interrupted; print the link to open.

    Args:
        host: the address to listen on; beyond loopback a token is required, the link contains it.
        host_names: names accepted as `Host` besides IP addresses and localhost.
        reached_as: HOST or HOST:PORT of the link, where it differs from `host`: in a container.
        allowed: folders whose files visitors may name, besides the folder of runs and what they
            upload there. On loopback without any: all that the user may read.

    Raises:
        UserError: the page can't be served there, or `reached_as` is not an address.
    """
    if reached_as:
        host_names = (*host_names, host_of_address(reached_as))
    incoming = Incoming(runs)
    is_local = is_loopback(host)
    folders = None if is_local and not allowed else (runs, *allowed)
    token = "" if is_local else secrets.token_hex(16)
    policy = AccessPolicy(token, host_names, allowed=AllowedPaths(folders), incoming=incoming)
    listener = listen(host, port)
    upload_error = _prepare_uploads(incoming)
    from jetson_ft.webui.page import make_app

    app = make_app(runs, policy)

    names = ", ".join(map(str, folders or ()))
    lines = [
        f"open: {link(host, listener.getsockname()[1], policy.token, reached_as)}",
        "Everyone with this link can train and chat here; others are refused."
        if policy.token
        else "From another machine: --host 0.0.0.0 (make webui HOST=0.0.0.0).",
        "The page can use every file that you can read (--allow-path FOLDER limits it)."
        if folders is None
        else f"The page can use files in {names} (--allow-path FOLDER adds one).",
    ]
    if upload_error:
        lines.append(f"warning: {upload_error}")

    # Before the link is printed, as it can take seconds: a printed link is answered at once.
    lines += take_up_runs(runs)

    def greet() -> None:
        for line in lines:
            print(printable(line), flush=True)

    server = make_server(app, greet)
    try:
        server.run([listener])
    finally:
        incoming.close()
        shutil.rmtree(os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


def _prepare_uploads(incoming: Incoming) -> UserError | None:
    """Let Gradio receive files in `incoming`; return why uploads will be refused.

    Gradio's own default is a folder in /tmp, which another user may have made.
    """
    try:
        incoming.prepare()
    except UserError as error:
        # Gradio writes somewhere when it starts, and receives there as long as it runs.
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp()
        incoming.refusal = error.with_fix(Message(_("Then start the page again.")))
        return incoming.refusal
    os.environ["GRADIO_TEMP_DIR"] = str(incoming.folder)
    return None


def link(host: str, port: int, token: str, reached_as: str = "") -> str:
    """Return the link to open; for all addresses (0.0.0.0), one that the network reaches."""
    address = processes.reachable_address(host, port, reached_as)
    return f"http://{address}/" + (f"?token={token}" if token else "")
