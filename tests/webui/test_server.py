"""The whole page with access control, and the command that serves it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
from served import Served

from jetson_ft.errors import UserError
from jetson_ft.http_access import is_known_host, is_loopback
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.webui import page
from jetson_ft.webui.security import AccessPolicy
from jetson_ft.webui.server import link, serve


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("192.168.1.7", False), ("orin.local", False)],
)  # fmt: skip
def test_only_loopback_addresses_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_link_has_a_reachable_host_and_the_token() -> None:
    assert link("127.0.0.1", 7860, "") == "http://127.0.0.1:7860/"
    assert link("::1", 7860, "abc") == "http://[::1]:7860/?token=abc"
    assert "0.0.0.0" not in link("0.0.0.0", 7860, "abc")
    assert link("0.0.0.0", 7860, "abc", "orin.local") == "http://orin.local:7860/?token=abc"
    assert link("0.0.0.0", 7860, "abc", "[fd00::1]:80") == "http://[fd00::1]:80/?token=abc"


@pytest.mark.parametrize(
    "address",
    ["host:abc", ":::7860", "::1", "http://1.2.3.4:7860", ":7860", "host:", "host:0", "host:65536",
     "host/x", "me@host", "a b", "[::1", " "],
)  # fmt: skip
def test_an_address_of_the_link_without_host_or_valid_port_is_refused(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    with pytest.raises(UserError, match="is not the address of a server") as caught:
        serve(tmp_path, "127.0.0.1", 0, (), address)
    assert "--reached-as" in str(caught.value.where) and "HOST:PORT" in str(caught.value.fix)


@pytest.mark.parametrize(
    "address", ["orin.local", "a_b:1", "1.2.3.4:65535", "[fd00::1]:80", "[::1]"]
)
def test_an_address_of_the_link_is_known_as_host(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[AccessPolicy] = []
    monkeypatch.setattr(page, "make_app", lambda _runs, policy: policies.append(policy))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    serve(tmp_path, "127.0.0.1", 0, (), address)
    assert is_known_host(address, policies[0].host_names)
    assert "" not in policies[0].host_names


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "mine.txt").write_text(Path("/etc/passwd").read_text())
    server = Served(folder)
    yield server
    server.close()


@pytest.mark.slow
def test_each_language_is_served_without_torch(served: Served) -> None:
    for language, word in (("en", "Upload a recipe file"), ("zh_CN", "开始训练")):
        page = served.get(f"/{language}/")
        assert page is not None and page.status_code == 200
        assert word in page.text or word.encode("unicode_escape").decode() in page.text
        elsewhere = set(re.findall(r"https?://([^/\"'\\ ]+)", page.text))
        assert not {name for name in elsewhere if "google" in name or "cdn" in name}
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "libtorch" not in maps


@pytest.mark.slow
def test_an_idle_server_uses_no_processor_time(served: Served) -> None:
    process = psutil.Process(served.process.pid)
    before = process.cpu_times()
    time.sleep(4)
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) < 0.02 * 4


@pytest.mark.slow
def test_the_running_server_refuses_foreign_requests(served: Served) -> None:
    for headers, status in (
        ({"Host": "evil.example"}, 400),
        ({}, 307),
    ):
        answer = served.get("/", headers=headers)
        assert answer is not None and answer.status_code == status
    foreign = {"Origin": "http://evil.example"}
    for path in ("/runs/x/stop", "/en/gradio_api/queue/join", "/en/gradio_api/upload"):
        answer = httpx.post(served.base + path, headers=foreign)
        assert answer.status_code == 403, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/environ", "mine.txt", "../../../etc/passwd"]
)
def test_no_file_of_the_machine_is_served(served: Served, path: str) -> None:
    secret = Path("/etc/passwd").read_text()[:20]
    for address in (f"/en/gradio_api/file={path}", f"/static/{path}", f"/en/file={path}"):
        answer = served.get(address)
        assert answer is not None and answer.status_code >= 400 and secret not in answer.text


@pytest.mark.slow
def test_beyond_loopback_a_token_is_required(tmp_path: Path) -> None:
    served = Served(tmp_path, "--host", "0.0.0.0")
    try:
        token = served.link.partition("token=")[2]
        assert len(token) == 32
        for path in ("/", "/en/", "/en/config", "/live/en/runs"):
            answer = served.get(path)
            assert answer is not None and answer.status_code == 401, path
            answer = served.get(path, headers={"Authorization": f"Bearer {token}"})
            assert answer is not None and answer.status_code < 400, path
    finally:
        served.close()


@pytest.mark.slow
def test_in_a_container_link_and_host_check_use_the_outside_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_HOST", "0.0.0.0")
    monkeypatch.setenv("JETSON_FT_REACHED_AS", "localhost")
    served = Served(tmp_path)
    try:
        assert re.fullmatch(r"http://localhost:\d+/\?token=[0-9a-f]{32}", served.link)
        token = {"Authorization": f"Bearer {served.link.partition('token=')[2]}"}
        for name, status in (("orin.local", 400), ("localhost", 307)):
            answer = served.get("/", headers={**token, "Host": name})
            assert answer is not None and answer.status_code == status, name
    finally:
        served.close()


@pytest.mark.slow
def test_a_resumable_run_is_named_at_the_start(tmp_path: Path) -> None:
    run = store.create_run(Recipe(output_dir=str(tmp_path / "runs")), "cut")
    run.write_state("running")
    served = Served(tmp_path)
    try:
        assert served.process.stdout
        lines = "".join(served.process.stdout.readline() for _line in range(3))
        assert f"{run.name} can be resumed" in lines
        assert f"jetson-ft train --resume {run.name}" in lines
    finally:
        served.close()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_as_soon_as_it_has_printed_its_link(
    end: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "jetson_ft.cli", "webui", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout and process.stdout.readline().startswith("open: ")
    process.send_signal(end)
    output, _ = process.communicate(timeout=20)
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_taken_port_is_reported_without_traceback(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "jetson_ft.cli", "webui", "--port", port],
            cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and "can't be listened on" in done.stderr and port in done.stderr
    assert "Traceback" not in done.stderr
