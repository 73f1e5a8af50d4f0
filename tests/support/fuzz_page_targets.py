"""Like `fuzz_targets`, for the requests that a page on a network answers."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from functools import lru_cache
from typing import Any
from unittest import mock
from urllib.parse import quote

from fuzz_targets import scratch, target
from starlette.testclient import TestClient

_HOME, _TOKEN = "http://127.0.0.1:7860", "secret"
_STREAMS = "heartbeat", "queue/data", "startup-events", "dev/reload"  # of events, without an end
_PRINTABLE = "".join(map(chr, range(33, 127)))
_opened = ExitStack()


@lru_cache
def _visitor() -> TestClient:
    """Return a client of a page whose buttons start no process, until `close`."""
    from jetson_ft.chat.client import ChatClient
    from jetson_ft.errors import UserError
    from jetson_ft.runs import jobs, manager
    from jetson_ft.webui import page, previews, security
    from jetson_ft.webui.allowed_paths import AllowedPaths
    from jetson_ft.webui.security import AccessPolicy
    from jetson_ft.webui.tabs import device

    def refuse(*_arguments: Any, **_named: Any) -> Any:
        raise UserError("No process here.")

    starts = ((previews, "run_json"), (device, "run_cli_json"), (manager, "launch"),
              (manager, "resume"), (jobs, "start"), (ChatClient, "generate"))  # fmt: skip
    for owner, name in starts:
        _opened.enter_context(mock.patch.object(owner, name, refuse))
    _opened.enter_context(mock.patch.object(security, "_REQUESTS", (10**9, 1.0)))
    runs = scratch() / "page"
    app = page.make_app(runs, AccessPolicy(_TOKEN, allowed=AllowedPaths((runs,))))
    client = TestClient(app, _HOME, raise_server_exceptions=False, follow_redirects=False)
    client.headers["Authorization"] = f"Bearer {_TOKEN}"
    return _opened.enter_context(client)  # its one event loop answers all requests


def close() -> None:
    """Close the page; its events may end after their requests, so it stays open between these."""
    _opened.close()
    _visitor.cache_clear()


def _require_run() -> None:
    """Make the run that a request may have deleted."""
    from run_folders import make_run

    runs = scratch() / "page"
    if not (runs / "one" / "recipe.yaml").exists():
        shutil.rmtree(runs / "one", ignore_errors=True)
        make_run(runs, "one", "finished")


def _calls() -> list[bytes]:
    """Return a request for each endpoint of the form, with the values that the page shows."""
    config = _visitor().get("/en/config").json()
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    lines = []
    for endpoint in config["dependencies"]:
        data = [values[part] for part in endpoint["inputs"]]
        body = {"data": data, "fn_index": endpoint["id"], "session_hash": "s"}
        lines.append(f"POST /en/gradio_api/queue/join\n{json.dumps(body)}".encode())
    return lines


@target(
    "GET /",
    "GET /healthz",
    "GET /live/en/runs",
    "GET /live/zh_CN/runs/one?from=1",
    "GET /runs/one/adapter.zip",
    "GET /runs/one/report.html?lang=zh_CN",
    "POST /runs/one/stop\n{}",
    "POST /runs/one/delete",
    'POST /runs/one/export\n{"choice": "merged", "unchecked": true}',
    "POST /runs/one/serve",
    "POST /runs/one/jobs/export/stop",
    "POST /runs/one/exports/lora/delete",
    "GET /runs/one/exports/lora/a.gguf",
    'POST /runs/one/about\n{"title": "a", "notes": null}',
    "POST /en/gradio_api/upload\n--B\r\nContent-Disposition: form-data; name=files",
    "DELETE /runs/%2e%2e/one",
    more=_calls,
)
def page(data: bytes) -> None:
    """Send a request: a method and an address in the first line, the body behind it."""
    line, _newline, body = data.partition(b"\n")
    method, _space, raw = line.partition(b" ")
    address = "/" + quote(raw.lstrip(b"/"), safe=_PRINTABLE)
    if not method.isalpha() or any(word in address for word in _STREAMS):
        return
    _require_run()
    kind = "application/json" if body.startswith(b"{") else "multipart/form-data; boundary=B"
    headers = {"Content-Type": kind}
    answer = _visitor().request(method.decode(), address, content=body, headers=headers)
    is_gradios = "/gradio_api/" in address  # which answers some wrong calls with 500
    assert answer.status_code < 500 or is_gradios, (answer.status_code, answer.text[:500])
    assert "Traceback (most recent call last)" not in answer.text, answer.text
