"""A local server that imitates the Hub's uploads: account, repositories, LFS objects, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, environment

TOKEN = "hf_writer"
_ROLES = {TOKEN: "write", "hf_reader": "read"}
COMMIT = "b" * 40


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their messages


class _Uploads(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        self._record(b"")
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        repo = self.path.partition("?")[0].removeprefix("/api/models/")
        if self.path == "/api/whoami-v2" and token in _ROLES:
            access = {"displayName": "t", "role": _ROLES[token]}
            account = {"type": "user", "name": "owner", "orgs": []}
            self._answer({**account, "auth": {"accessToken": access}})
        elif self.path == "/api/whoami-v2":
            self._answer({"error": "no"}, 401)
        elif stored := self.server.repositories.get(repo):
            self._answer({"id": repo, "sha": COMMIT, "private": stored.private, "siblings": []})
        else:
            self._answer({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._record(body)
        lines = [json.loads(line) for line in body.splitlines()]
        if self.path == "/api/repos/create":
            self._create(lines[0])
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [self._mode(file) for file in lines[0]["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer({"objects": [self._action(item) for item in lines[0]["objects"]]})
        elif "/commit/" in self.path:
            self._commit(lines)
        else:
            self._answer({"error": "no"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._record(body)
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        if self.server.broken_puts and len(self.server.objects):
            self._answer({"error": "no"}, 400)
            return
        self.server.objects[oid] = body
        self._answer({})

    def _record(self, body: bytes) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        self.server.bodies.append(body)

    def _answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "owner":
            self._answer({"error": "no rights"}, 403)
        elif repo in self.server.repositories:
            self._answer({"error": "exists"}, 409)
        else:
            self.server.repositories[repo] = Repository(wanted["visibility"] == "private")
            self._answer({"url": f"{self.server.address}/{repo}"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith((".safetensors", ".gguf"))
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _action(self, item: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.server.objects:
            return known
        href = f"{self.server.address}/objects/{item['oid']}"
        return {**known, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        repo = self.path.split("/commit/")[0].removeprefix("/api/models/")
        stored = self.server.repositories[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                stored.commits.append(value["summary"])
            elif line["key"] == "file":
                stored.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                stored.files[value["path"]] = self.server.objects[value["oid"]]
        self._answer(
            {"commitUrl": f"{self.server.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        )


class UploadHub(FakeHub):
    """Keeps what it is sent; `owner` is the account of its tokens."""

    def __init__(self) -> None:
        super().__init__(_Uploads)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.bodies: list[bytes] = []  # of all requests
        self.broken_puts = False  # objects after the first are refused

    def sent(self) -> list[str]:
        """Return the requests that send something, but for the token."""
        return [f"{command} {path}" for command, path, _ in self.requests if command != "GET"]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a client with a token that may write, over plain LFS."""
        own = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **more}
        return environment(self.address, home, **own)


@pytest.fixture
def upload_hub() -> Iterator[UploadHub]:
    with UploadHub() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.01,), daemon=True).start()
        yield fake
        fake.shutdown()
