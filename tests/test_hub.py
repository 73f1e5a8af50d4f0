"""The hub: a local server that answers as it does, asked through the real client."""

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
_REFUSALS = {
    "gated": (401, "GatedRepo"),
    "missing": (404, "RepoNotFound"),
    "forbidden": (403, ""),
}

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
        found = {"value": getattr(hub, name)(*args)}
    except UserError as error:
        found = {"what": error.what, "where": error.where, "fix": error.fix}
    answers.append({**found, "seconds": time.monotonic() - started})
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

    def asked_for(self, name: str) -> list[dict[str, str]]:
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


def ask(address: str, home: Path, *calls: Any, **more: str) -> list[dict[str, Any]]:
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


def test_files_are_listed_and_those_that_match_are_fetched(server: FakeHub, tmp_path: Path) -> None:
    listed, fetched = ask(server.address, tmp_path, ("list_files", "o/n", "model"), FETCH)
    assert listed["value"] == sorted(FILES)
    folder = Path(fetched["value"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert not list(tmp_path.rglob("*.part"))
    assert len(server.asked_for("model.safetensors")) == 1
    assert not server.asked_for("README.md")


TOLD = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
from jetson_ft import hub
hub._TOLD_EVERY, told = 0.0, []
class Enough(Exception): pass
def tell(*news):
    told.append(news)
    if len(told) == 2: raise Enough
for _ in range(2):
    try:
        with hub.telling(tell): hub.fetch("o/n", "model", ["*.safetensors"])
    except Enough: told.append(None)
print(json.dumps(told))
"""


def test_a_download_is_told_of_and_ended_from_outside(server: FakeHub, tmp_path: Path) -> None:
    with start(server.address, tmp_path, script=TOLD) as client:
        out, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    first, second, ended, *later = json.loads(out)
    assert ended is None and second[1] == 2 << 18
    assert [news[1] for news in later] == [3 << 18, 4 << 18], "the second goes on where one ended"
    for name, done, total, left in (first, second, *later):
        assert name == "model.safetensors" and 0 < done <= total == len(BIG) and left >= 0


def test_models_whose_weights_lie_here_are_listed(server: FakeHub, tmp_path: Path) -> None:
    listed, config = ("downloaded_models",), ("fetch", "o/n", "model", ["config.json"])
    answers = ask(server.address, tmp_path, listed, config, listed, FETCH, listed)
    assert [answer["value"] for answer in answers[::2]] == [[], [], ["o/n"]]


def test_the_token_is_sent(server: FakeHub, tmp_path: Path) -> None:
    ask(server.address, tmp_path, FETCH, HF_TOKEN="hf_secret")
    sent = [headers.get("authorization") for _, path, headers in server.requests if "o/n" in path]
    assert sent
    assert set(sent) == {"Bearer hf_secret"}


def test_what_was_fetched_works_without_the_hub(server: FakeHub, tmp_path: Path) -> None:
    ask(server.address, tmp_path, FETCH)
    more = ("fetch", "o/n", "model", ["*"])
    listed, fetched, incomplete = ask(
        closed_port(), tmp_path, ("list_files", "o/n", "model"), FETCH, more
    )
    assert listed["value"] == ["config.json", "model.safetensors"]
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert "The hub is out of reach" in incomplete["what"]


def test_refusals_are_told_apart(server: FakeHub, tmp_path: Path) -> None:
    gated, missing, forbidden, impossible = ask(
        server.address,
        tmp_path,
        ("list_files", "o/gated", "model"),
        ("list_files", "o/missing", "dataset"),
        ("list_files", "o/forbidden", "model"),
        ("list_files", "o/n--x", "model"),
    )
    assert gated["what"] == "The model 'o/gated' is gated."
    assert "HF_TOKEN" in gated["fix"]
    assert missing["what"] == "The hub knows no data set 'o/missing', or it is private."
    assert "HF_TOKEN" in missing["fix"]
    assert missing["where"] == f"{server.address}/datasets/o/missing"
    assert "answered with error 403" in forbidden["what"]
    assert "HF_TOKEN" in forbidden["fix"]
    assert "knows no model 'o/n--x'" in impossible["what"]


def test_a_hub_out_of_reach_says_so_and_what_works_offline(tmp_path: Path) -> None:
    address = closed_port()
    answers = ask(
        address, tmp_path, ("list_files", "o/x", "model"), ("fetch", "o/x", "model", ["*"])
    )
    for answer in answers:
        assert answer["what"] == "The hub is out of reach, so the model 'o/x' can't be fetched."
        assert answer["where"] == f"{address}/o/x"
        for words in (
            "HF_ENDPOINT",
            "HF_TOKEN",
            "What works offline: `model: embedded`",
            "HF_HOME",
        ):
            assert words in answer["fix"]
        assert answer["seconds"] < 10


def test_an_impossible_name_is_refused_plainly_without_the_hub(tmp_path: Path) -> None:
    (answer,) = ask(closed_port(), tmp_path, ("list_files", "o/n--x", "model"))
    assert "knows no model" in answer["what"]


def test_being_told_to_stay_offline_is_named(server: FakeHub, tmp_path: Path) -> None:
    (answer,) = ask(server.address, tmp_path, ("list_files", "o/n", "model"), HF_HUB_OFFLINE="1")
    assert answer["what"].startswith("HF_HUB_OFFLINE is set")
    assert not server.requests


@pytest.mark.slow
def test_a_hub_that_accepts_and_never_answers_takes_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        (answer,) = ask(address, tmp_path, ("fetch", "o/x", "model", ["*"]))
    assert "out of reach" in answer["what"]
    assert answer["seconds"] < 10


def test_a_killed_download_goes_on_where_it_stopped(server: FakeHub, tmp_path: Path) -> None:
    server.stall = True
    with start(server.address, tmp_path, FETCH) as client:
        try:
            assert server.stalled.wait(20)
            (part,) = _wait_for_part(tmp_path, CUT // 2)
        finally:
            client.kill()
    kept = part.stat().st_size
    server.stall = False
    (fetched,) = ask(server.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    assert server.asked_for("model.safetensors")[-1]["Range"] == f"bytes={kept}-"
    assert not list(tmp_path.rglob("*.part"))


def _wait_for_part(home: Path, size: int) -> list[Path]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [path for path in home.rglob("*.part") if path.stat().st_size >= size]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("nothing was kept")


def test_a_download_cut_off_within_a_call_is_taken_up_by_itself(
    server: FakeHub, tmp_path: Path
) -> None:
    server.stall = True
    server.released.set()  # the connection closes instead of standing still
    (fetched,) = ask(server.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG
    first, second = server.asked_for("model.safetensors")
    assert "Range" not in first
    assert int(second["Range"].removeprefix("bytes=").rstrip("-")) >= CUT // 2


def test_a_damaged_download_is_thrown_away(server: FakeHub, tmp_path: Path) -> None:
    server.contents["model.safetensors"] = BIG[:-1] + b"x"
    (answer,) = ask(server.address, tmp_path, FETCH)
    assert "arrived damaged" in answer["what"]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 9999
    ]
    server.contents.clear()
    (fetched,) = ask(server.address, tmp_path, FETCH)
    assert (Path(fetched["value"]) / "model.safetensors").read_bytes() == BIG


def test_a_place_that_cant_hold_the_download_is_named(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (answer,) = ask(server.address, tmp_path / "file" / "hf", FETCH)
    assert answer["what"] == "A file stands where a folder is needed."
    assert str(tmp_path / "file") in answer["where"]


# In this process: the address and whether somebody answers there.


def test_the_address_is_the_mirror_where_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert hub.endpoint() == "https://mirror.example"
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub.endpoint() == "https://huggingface.co"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.usefixtures("online")
def test_a_hub_is_reachable_when_it_answers_anything(
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
def test_a_wrong_address_is_out_of_reach(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert not hub.reachable()


@pytest.mark.usefixtures("online")
def test_a_name_lookup_that_hangs_takes_no_longer_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hung = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: hung.wait(20))
    started = time.monotonic()
    assert not hub.reachable(timeout=0.2)
    assert time.monotonic() - started < 5
    hung.set()


def test_other_faults_are_not_dressed_up_as_the_network() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("o/n", "model"):
        _ = 1 / 0


def test_a_full_disk_is_not_called_the_network(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "blob"))
    with pytest.raises(UserError, match="disk is full"), hub.hub_errors("o/n", "model"):
        raise full
