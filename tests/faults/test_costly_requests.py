"""Requests that start processes, and chats: few at once, in bounds, ended with their clients."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from page_client import PageClient
from run_folders import make_run
from served import Served
from starlette.testclient import TestClient
from workbench import wait_for

from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling
from jetson_ft.webui import cli_json, limits

pytestmark = pytest.mark.any_packages

# Costly questions


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_WAIT_SECONDS", 0.2)


@pytest.mark.promise(42)
@pytest.mark.usefixtures("few_places")
def test_few_commands_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran-$$\nsleep 1\necho '{{\"a\": 1}}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def ask(_number: int) -> str:
        try:
            return str(cli_json.run_cli_json("doctor", "--json"))
        except limits.BusyError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert len(list(tmp_path.glob("ran-*"))) == limits.MAX_COSTLY
    assert answers.count("{'a': 1}") == limits.MAX_COSTLY
    assert all("Try again" in answer for answer in answers if answer != "{'a': 1}")
    assert ask(0) == "{'a': 1}"  # the places are free again


@pytest.mark.promise(42)
@pytest.mark.usefixtures("few_places")
def test_zip_beside_costly_work_gets_429(tmp_path: Path) -> None:
    from fastapi import FastAPI

    from jetson_ft.webui import api

    run = make_run(tmp_path, "20260101-000000-a")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    app = FastAPI()
    app.include_router(api.router(tmp_path))
    app.add_exception_handler(UserError, api.error_response)
    client = TestClient(app)
    address = f"/runs/{run.name}/adapter.zip"
    with limits.costly(), limits.costly():
        refused = client.get(address)
        assert refused.status_code == 429 and "Busy" in refused.json()["what"]
        assert int(refused.headers["retry-after"]) >= 1
    assert client.get(address).status_code == 200


@pytest.mark.promise(42)
def test_command_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    script = "from jetson_ft.webui.cli_json import run_cli_json as run; run('webui', '--port', '0')"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    (child,) = wait_for(psutil.Process(parent.pid).children)

    def is_served() -> bool:
        for connection in child.net_connections("tcp"):
            with suppress(httpx.HTTPError):
                return httpx.get(f"http://127.0.0.1:{connection.laddr.port}/healthz").is_success
        return False

    wait_for(is_served)  # then it prints no more, which would end it too
    parent.kill()
    parent.wait()
    _gone, alive = psutil.wait_procs([child], timeout=5)
    for each in alive:
        each.kill()
    assert not alive


# Chats


@pytest.mark.promise(36)
@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "temperature", "top_p", "seed"])
@pytest.mark.parametrize(
    "value",
    [1e9, 10**400, -1, float("nan"), float("inf"), "12", True, [1], {"a": 1}, "x" * 100_000],
)
def test_sampling_outside_its_bounds_is_refused(name: str, value: Any) -> None:
    if name == "seed" and value == 1e9:
        return  # a seed may be large
    with pytest.raises(UserError) as caught:
        Sampling(**{name: value})
    assert name in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.promise(36)
def test_sampling_of_a_slider_is_whole() -> None:
    assert repr(Sampling(max_new_tokens=256.0).max_new_tokens) == "256"  # type: ignore[arg-type]
    with pytest.raises(UserError, match="whole"):
        Sampling(top_k=1.5)  # type: ignore[arg-type]


def message(client: PageClient, text: str, **changed: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return the endpoint of a chat's Send and its inputs."""
    send = client.dependency("send")
    values = client.values(send, **changed)
    values[2:8] = text, [], [], "", "", ""
    return send, values


def is_refused(client: PageClient) -> bool:
    """Send a short message; return whether the composer has it again."""
    composer = client.call(*message(client, "hi", chat_max_new_tokens=1))[0]
    return bool(composer.get("value") == "hi")


@pytest.mark.slow(minutes=0.5)
@pytest.mark.promise(36)
def test_chat_called_by_hand_is_bounded_and_ends_with_its_client(tmp_path: Path) -> None:
    served = Served(tmp_path)
    try:
        client = PageClient(served.base)
        for value in (10**9, -1, "1e9", None, [1]):
            with pytest.raises(AssertionError, match="process_completed"):
                client.call(*message(client, "你好", chat_max_new_tokens=value))
        assert not psutil.Process(served.process.pid).children()
        send, values = message(client, "写一首很长的诗", chat_max_new_tokens=1024)
        joined = {"data": values, "fn_index": send["id"], "session_hash": client.session}
        client.http.post("/gradio_api/queue/join", json=joined).raise_for_status()
        stream = f"/gradio_api/queue/data?session_hash={client.session}"
        with client.http.stream("GET", stream) as lines:
            generated = (line for line in lines.iter_lines() if "process_generating" in line)
            for _delta in range(3):  # the first ones say that the model is loaded
                next(generated)
            other = PageClient(served.base)
            assert is_refused(other), "busy"
        left = time.monotonic()
        while is_refused(other):
            assert time.monotonic() - left < 10
            time.sleep(0.2)
    finally:
        served.kill()
