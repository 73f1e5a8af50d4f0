"""A local server that imitates the Hub, and the real client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
BIG = bytes(range(256)) * 4096  # 1 MiB, kept as LFS
FILES = {"config.json": b'{"model_type": "phi"}', "README.md": b"# x", "model.safetensors": BIG}
CUT = 700_000
FETCH = ("fetch", "o/n", "model", ["*.safetensors", "config.json"])
_REFUSALS = {"gated": (401, "GatedRepo"), "missing": (404, "RepoNotFound"), "forbidden": (403, "")}

# Run in a process of its own, since the client reads HF_ENDPOINT when it is imported.
CLIENT = """
import json, sys, time
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
from jetson_ft import hub
from jetson_ft.errors import UserError
answers = []
for name, *args in json.loads(sys.argv[1]):
    started = time.monotonic()
    try:
        answer = {"value": getattr(hub, name)(*args)}
    except UserError as error:
        answer = error.as_json()
    answers.append({**answer, "seconds": time.monotonic() - started})
print(json.dumps(answers, default=str))
"""


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        refusal = next((_REFUSALS[part] for part in parts if part in _REFUSALS), None)
        if refusal:
            self._answer(refusal[0], b'{"error": "no"}', {"X-Error-Code": refusal[1]})
        elif "tree" in parts:
            self._answer_json([_entry(name) for name in FILES])
        elif parts[:1] == ["api"] and parts[-1] != "agent-harnesses":
            siblings = [_sibling(name) for name in FILES]
            self._answer_json({"id": "o/n", "sha": COMMIT, "siblings": siblings})
        elif "resolve" in parts:
            self._answer_file(parts[-1])
        else:
            self._answer(404 if parts != [""] else 200)

    def _answer_json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, name: str) -> None:
        content = self.server.contents.get(name, FILES[name])
        headers = {"ETag": f'"{_sha(FILES[name])}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if start else 200, content[start:], headers)

    def _answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        if len(body) > CUT and self.server.stall:
            self.wfile.write(body[:CUT])
            self.wfile.flush()
            self.server.stalled.set()
            self.server.released.wait(20)
            self.close_connection = True
            return
        self.wfile.write(body)


class FakeHub(ThreadingHTTPServer):
    """Serves one repository, `o/n`, and refuses others by their name."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or _Hub)
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.contents: dict[str, bytes] = {}
        self.stall = False
        self.stalled, self.released = threading.Event(), threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def requests_for(self, name: str) -> list[dict[str, str]]:
        """Headers of the requests for a file's content."""
        return [
            headers
            for command, path, headers in self.requests
            if command == "GET" and path.endswith(f"/resolve/{COMMIT}/{name}")
        ]


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(name: str) -> dict[str, Any]:
    content = FILES[name]
    lfs = {"oid": _sha(content), "size": len(content), "pointerSize": 130}
    known = {"type": "file", "path": name, "size": len(content), "oid": _sha(content)[:40]}
    return {**known, "lfs": lfs} if content is BIG else known


def _sibling(name: str) -> dict[str, Any]:
    content = FILES[name]
    lfs = {"sha256": _sha(content), "size": len(content), "pointerSize": 130}
    known = {"rfilename": name, "size": len(content), "blobId": _sha(content)[:40]}
    return {**known, "lfs": lfs} if content is BIG else known


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        fake.released.set()
        fake.shutdown()


def environment(address: str, home: Path, **more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**own, "HF_ENDPOINT": address, "HF_HOME": str(home), "no_proxy": "*", **more}


def start(
    address: str, home: Path, *calls: Any, script: str = CLIENT, **more: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(calls)],
        env=environment(address, home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(address: str, home: Path, *calls: Any, **more: str) -> list[dict[str, Any]]:
    with start(address, home, *calls, **more) as client:
        try:
            out, errors = client.communicate(timeout=20)
        finally:
            client.kill()
    assert client.returncode == 0, errors
    answers: list[dict[str, Any]] = json.loads(out)
    return answers


def closed_port() -> str:
    """Return the address of a server that isn't there."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def wait_for_part(home: Path, size: int) -> list[Path]:
    """Return the parts of files that are being downloaded, once they have so many bytes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        parts = [path for path in home.rglob("*.part") if path.stat().st_size >= size]
        if parts:
            return parts
        time.sleep(0.02)
    raise AssertionError("no part was kept")
