"""The hub: the real client with a local server."""

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

from jetson_ft import hub
from jetson_ft.errors import UserError

COMMIT = "a" * 40
BIG = bytes(range(256)) * 4096  # 1 MiB, kept as LFS
FILES = {"config.json": b'{"model_type": "phi"}', "README.md": b"# x", "model.safetensors": BIG}
CUT = 700_000
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

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
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
def server() -> Iterator[FakeHub]:
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
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


FETCH = ("fetch", "o/n", "model", ["*.safetensors", "config.json"])


def test_files_are_listed_and_matching_ones_downloaded(server: FakeHub, tmp_path: Path) -> None:
    listed, fetched = run_client(server.address, tmp_path, ("list_files", "o/n", "model"), FETCH)
    assert listed["value"] == sorted(FILES)
    folder = Path(fetched["value"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert not list(tmp_path.rglob("*.part"))
    assert len(server.requests_for("model.safetensors")) == 1
    assert not server.requests_for("README.md")


PROGRESS = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
from jetson_ft import hub
hub._REPORT_SECONDS, calls = 0.0, []
class Enough(Exception): pass
def callback(*arguments):
    calls.append(arguments)
    if len(calls) == 2: raise Enough
for _ in range(2):
    try:
        with hub.download_progress(callback): hub.fetch("o/n", "model", ["*.safetensors"])
    except Enough: calls.append(None)
print(json.dumps(calls))
"""


def test_progress_callback_can_end_the_download(server: FakeHub, tmp_path: Path) -> None:
    with start(server.address, tmp_path, script=PROGRESS) as client:
        out, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    first, second, ended, *later = json.loads(out)
    assert ended is None and second[1] == 2 << 18
    assert [call[1] for call in later] == [3 << 18, 4 << 18], "the second resumes"
    for name, done, total, left in (first, second, *later):
        assert name == "model.safetensors" and 0 < done <= total == len(BIG) and left >= 0


def test_models_with_cached_weights_are_listed(server: FakeHub, tmp_path: Path) -> None:
    listed, config = ("downloaded_models",), ("fetch", "o/n", "model", ["config.json"])
    answers = run_client(server.address, tmp_path, listed, config, listed, FETCH, listed)
    assert [answer["value"] for answer in answers[::2]] == [[], [], ["o/n"]]


def test_the_token_is_sent(server: FakeHub, tmp_path: Path) -> None:
    run_client(server.address, tmp_path, FETCH, HF_TOKEN="hf_secret")
    sent = [headers.get("authorization") for _, path, headers in server.requests if "o/n" in path]
    assert sent
    assert set(sent) == {"Bearer hf_secret"}


def test_cached_files_work_without_the_hub(server: FakeHub, tmp_path: Path) -> None:
    run_client(server.address, tmp_path, FETCH)
    more = ("fetch", "o/n", "model", ["*"])
    listed, fetched, incomplete = run_client(
        closed_port(), tmp_path, ("list_files", "o/n", "model"), FETCH, more
    )
    assert listed["value"] == ["config.json", "model.safetensors"]
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert "the Hub can't be reached" in incomplete["what"]


def test_cached_folder_is_returned_without_the_hub(server: FakeHub, tmp_path: Path) -> None:
    call = ("cached_folder", "o/n", "model")
    before, fetched = run_client(server.address, tmp_path, call, FETCH)
    after, impossible = run_client(
        closed_port(), tmp_path, call, ("cached_folder", "o/n--x", "model")
    )
    assert before["value"] is None and after["value"] == fetched["value"]
    assert "Model 'o/n--x' not found" in impossible["what"]


def test_each_refusal_has_its_message(server: FakeHub, tmp_path: Path) -> None:
    gated, missing, forbidden, impossible = run_client(
        server.address,
        tmp_path,
        ("list_files", "o/gated", "model"),
        ("list_files", "o/missing", "dataset"),
        ("list_files", "o/forbidden", "model"),
        ("list_files", "o/n--x", "model"),
    )
    assert gated["what"] == "'o/gated' is gated on the Hub."
    assert "HF_TOKEN" in gated["fix"]
    assert missing["what"] == "Data set 'o/missing' not found on the Hub, or it is private."
    assert "HF_TOKEN" in missing["fix"]
    assert missing["where"] == f"{server.address}/datasets/o/missing"
    assert "answered with error 403" in forbidden["what"]
    assert "HF_TOKEN" in forbidden["fix"]
    assert "Model 'o/n--x' not found" in impossible["what"]


def test_unreachable_hub_is_reported_with_what_works_offline(tmp_path: Path) -> None:
    address = closed_port()
    answers = run_client(
        address, tmp_path, ("list_files", "o/x", "model"), ("fetch", "o/x", "model", ["*"])
    )
    for answer in answers:
        assert answer["what"] == "'o/x' can't be downloaded: the Hub can't be reached."
        assert answer["where"] == f"{address}/o/x"
        for words in (
            "HF_ENDPOINT",
            "HF_TOKEN",
            "These work offline: `model: embedded`",
            "HF_HOME",
        ):
            assert words in answer["fix"]
        assert answer["seconds"] < 10


def test_impossible_name_is_refused_without_the_hub(tmp_path: Path) -> None:
    (answer,) = run_client(closed_port(), tmp_path, ("list_files", "o/n--x", "model"))
    assert "not found" in answer["what"]


def test_offline_setting_is_reported(server: FakeHub, tmp_path: Path) -> None:
    (answer,) = run_client(
        server.address, tmp_path, ("list_files", "o/n", "model"), HF_HUB_OFFLINE="1"
    )
    assert "HF_HUB_OFFLINE is set" in answer["what"]
    assert not server.requests


@pytest.mark.slow
def test_hub_that_never_answers_takes_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        (answer,) = run_client(address, tmp_path, ("fetch", "o/x", "model", ["*"]))
    assert "can't be reached" in answer["what"]
    assert answer["seconds"] < 10


def test_killed_download_resumes(server: FakeHub, tmp_path: Path) -> None:
    server.stall = True
    with start(server.address, tmp_path, FETCH) as client:
        try:
            assert server.stalled.wait(20)
            (part,) = _wait_for_part(tmp_path, CUT // 2)
        finally:
            client.kill()
    kept = part.stat().st_size
    server.stall = False
    (fetched,) = run_client(server.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert server.requests_for("model.safetensors")[-1]["Range"] == f"bytes={kept}-"
    assert not list(tmp_path.rglob("*.part"))


def _wait_for_part(home: Path, size: int) -> list[Path]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        parts = [path for path in home.rglob("*.part") if path.stat().st_size >= size]
        if parts:
            return parts
        time.sleep(0.02)
    raise AssertionError("no part was kept")


def test_download_cut_off_within_a_call_resumes(server: FakeHub, tmp_path: Path) -> None:
    server.stall = True
    server.released.set()  # the connection closes instead of standing still
    (fetched,) = run_client(server.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    first, second = server.requests_for("model.safetensors")
    assert "Range" not in first
    assert int(second["Range"].removeprefix("bytes=").rstrip("-")) >= CUT // 2


def test_damaged_download_is_deleted(server: FakeHub, tmp_path: Path) -> None:
    server.contents["model.safetensors"] = BIG[:-1] + b"x"
    (answer,) = run_client(server.address, tmp_path, FETCH)
    assert "download was damaged" in answer["what"]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 9999
    ]
    server.contents.clear()
    (fetched,) = run_client(server.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG


def test_cache_that_cant_be_written_is_reported(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (answer,) = run_client(server.address, tmp_path / "file" / "hf", FETCH)
    assert answer["what"] == "Expected a folder, found a file."
    assert str(tmp_path / "file") in answer["where"]


# In this process: the address, and whether it answers.


def test_endpoint_is_the_mirror_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert hub.endpoint() == "https://mirror.example"
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub.endpoint() == "https://huggingface.co"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.usefixtures("online")
def test_hub_that_answers_anything_is_reachable(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    assert hub.reachable()
    monkeypatch.setenv("HF_ENDPOINT", f"{server.address}/nothing/here")
    assert hub.reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert not hub.reachable()


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "nonsense", "http://[", "http://\u4e2d "]
)
def test_wrong_address_is_not_reachable(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.reachable()


@pytest.mark.usefixtures("online")
def test_name_lookup_that_hangs_ends_at_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: hung.wait(20))
    started = time.monotonic()
    assert not hub.reachable(timeout=0.2)
    assert time.monotonic() - started < 5
    hung.set()


def test_other_exceptions_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("o/n", "model"):
        _ = 1 / 0


def test_full_disk_is_not_reported_as_the_network(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "blob"))
    with pytest.raises(UserError, match="disk is full"), hub.hub_errors("o/n", "model"):
        raise full
