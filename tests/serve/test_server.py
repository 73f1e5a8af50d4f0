"""`jetson-ft serve` as a process: its address, its key, its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from light_jobs import LightJobs
from openai import OpenAI
from program import assert_refused, main_here, run
from workbench import wait_for

from jetson_ft.runs import jobs


@pytest.fixture
def start(
    tmp_path: Path, slow_gguf: Path, tiny_gguf: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts the server with the tiny Llama."""
    processes = []

    def start_server(*options: str, slow: bool = False) -> subprocess.Popen[str]:
        words = [
            "serve",
            str(slow_gguf if slow else tiny_gguf),
            "--port",
            "0",
            "--context",
            "128",
            *options,
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "jetson_ft.cli", *words], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start_server
    for process in processes:
        process.kill()
        process.wait()


def greeting(process: subprocess.Popen[str]) -> str:
    """Return what the server prints until it is ready."""
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if line.startswith("serving: "):
            break
    return "".join(lines)


def test_beyond_loopback_a_key_is_printed_and_needed(start: Callable[..., object]) -> None:
    process = start("--host", "0.0.0.0")
    text = greeting(process)  # type: ignore[arg-type]
    key = re.search(r"^key: ([0-9a-f]{32})$", text, re.MULTILINE)[1]  # type: ignore[index]
    port = re.search(r"^serving: http://[\d.]+:(\d+)/v1$", text, re.MULTILINE)[1]  # type: ignore[index]
    base = f"http://127.0.0.1:{port}/v1"
    assert httpx.get(f"{base}/models").status_code == 401
    client = OpenAI(base_url=base, api_key=key)
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=3)
    assert answer.usage and answer.usage.completion_tokens == 3


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_with_its_engine(
    end: signal.Signals, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start()
    text = greeting(process)
    assert "key: " not in text and "curl http://127.0.0.1:" in text
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(end)
    output, _ = process.communicate(timeout=20)
    assert "Traceback" not in output
    assert not any(child.is_running() for child in children)


def test_the_engine_ends_when_the_server_is_killed(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start()
    greeting(process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.kill()
    wait_for(lambda: not any(child.is_running() for child in children))


def test_a_sigterm_while_the_model_loads_leaves_nothing(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start(slow=True)
    assert process.stdout and process.stdout.readline().startswith("loading")
    children = wait_for(lambda: psutil.Process(process.pid).children(recursive=True))
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    wait_for(lambda: not any(child.is_running() for child in children))


def test_a_job_of_the_page_has_the_address_and_ends(light_jobs: LightJobs, tiny_gguf: Path) -> None:
    run = light_jobs.run()
    words = ["serve", str(tiny_gguf), "--port", "0", "--context", "128", "--json"]
    jobs.start(run, "serve", words)
    job = wait_for(lambda: (job := jobs.read(run, "serve")) and job.result and job, 60)
    assert job.is_live and job.result["models"] == ["tiny"] and job.result["api_key"] == ""
    client = OpenAI(base_url=job.result["url"], api_key="none")
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=3).choices
    processes = [
        process for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("JETSON_FT_PROGRESS", "").startswith(str(run.path))
    ]  # fmt: skip
    assert len(processes) == 2  # the command and its engine
    jobs.stop(run, "serve")
    light_jobs.wait(run, "stopped", name="serve")
    assert not any(process.is_running() for process in processes)
    log = (jobs.job_folder(run, "serve") / "log.txt").read_text()
    assert log.startswith("loading tiny") and "Traceback" not in log


def test_a_port_in_use_is_reported_before_anything_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "no-such-run", "--port", port, cwd=tmp_path)
    assert_refused(done, port)
    assert "no-such-run" not in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing"], "'nothing' not found"),
        ([], "latest"),
        (["base", "some-run"], "beside runs"),
        (["broken.gguf"], "no GGUF file"),
        (["base", "--quantize", "q9"], "'q9'"),
    ],
)
def test_what_cant_be_served_is_refused(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
    (tmp_path / "broken.gguf").write_bytes(os.urandom(100))
    done = main_here("serve", *words, "--port", "0")
    assert done.returncode == 2 and expected in done.stderr, done.stderr
