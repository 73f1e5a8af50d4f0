"""llama.cpp's server as a child process: its settings, its end, and its errors in plain words."""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tiny_gguf import write_gguf

from jetson_ft.errors import UserError
from jetson_ft.export import llama
from jetson_ft.export.llama import LlamaServer, find_program


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny, one.gguf")


@pytest.fixture(autouse=True)
def _xllamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama.PROGRAM, "")


def _program(path: Path, version: str, body: str) -> Path:
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "version: {version} (abc)" >&2; exit; fi\n'
        f"{body}\n"
    )
    path.chmod(0o755)
    return path


def test_it_serves_its_key_alone_and_ends(model: Path) -> None:
    with LlamaServer(model, n_ctx=32, n_parallel=2, threads=1) as server:
        assert server.url.startswith("http://127.0.0.1:")
        answer = server.request(
            "/completion", {"prompt": [3, 4, 5], "n_predict": 4, "return_tokens": True}
        )
        assert answer["tokens"]
        properties = server.request("/props")
        assert properties["total_slots"] == 2
        assert properties["default_generation_settings"]["n_ctx"] >= 32
        process = psutil.Process(server._process.pid)  # type: ignore[union-attr]
        assert server.api_key not in " ".join(process.cmdline())
        addresses = {c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for path in ("/completion", "/lora-adapters", "/slots"):
            connection.request("POST" if path == "/completion" else "GET", path, b"{}")
            response = connection.getresponse()
            response.read()
            assert response.status == 401, path
        with pytest.raises(UserError, match="refuses a request"):
            server.request("/completion", {"prompt": {"a": 1}})
    assert not server.is_alive
    assert not process.is_running()


def test_a_request_to_a_killed_server_says_so(model: Path) -> None:
    with LlamaServer(model, n_ctx=32, threads=1) as server:
        server._process.kill()  # type: ignore[union-attr]
        server._process.wait()  # type: ignore[union-attr]
        with pytest.raises(UserError, match="ran out of memory"):
            server.request("/v1/models")


def test_an_answer_is_streamed_and_a_killed_server_ends_it_with_an_error(model: Path) -> None:
    body = {"prompt": [3, 4], "n_predict": 20, "stream": True, "ignore_eos": True}
    with LlamaServer(model, n_ctx=64, threads=1) as server:
        *_, last = server.stream("/completion", body)
        assert last["stop"] and last["tokens_predicted"] == 20
        with pytest.raises(UserError, match="refuses a request"):
            next(server.stream("/completion", {"prompt": {"a": 1}}))
        events = server.stream("/completion", {**body, "n_predict": 50})
        next(events)
        server._process.kill()  # type: ignore[union-attr]
        with pytest.raises(UserError, match=r"ran out of memory|doesn't answer"):
            list(events)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (b'data: {"content": "a"}\n\nerror: {"code": 500, "message": "no slot"}\n\n', "no slot"),
        (b'data: {"content": "a"}\n\ndata: {"error": {"message": "no slot"}}\n\n', "no slot"),
        (b'data: {"content": "a"}\n\n', "doesn't answer|can't be started"),  # without an end
    ],
)
def test_an_error_in_the_middle_of_an_answer_is_raised(
    model: Path, events: bytes, message: str
) -> None:
    server = LlamaServer(model, n_ctx=32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.port = listener.getsockname()[1]
        stream = server.stream("/completion", {})

        def answer() -> None:
            connection = listener.accept()[0]
            with connection:
                connection.recv(1 << 16)
                head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(head + b"%x\r\n%b\r\n" % (len(events), events))

        thread = threading.Thread(target=answer)
        thread.start()
        assert next(stream) == {"content": "a"}
        with pytest.raises(UserError, match=message):
            next(stream)
        thread.join()


def test_a_system_that_forks_no_more_is_an_error_of_its_own(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(llama.subprocess, "Popen", fork)
    with (
        pytest.raises(UserError, match=r"can't be started: .*temporarily unavailable"),
        LlamaServer(model, n_ctx=32, threads=1),
    ):
        pass


def test_an_interrupt_while_the_process_starts_leaves_none(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C, before the thread that starts the process has it."""
    popen, children = subprocess.Popen, []

    def start_slowly(*args: object, **options: object) -> subprocess.Popen[str]:
        time.sleep(0.5)
        children.append(popen(*args, **options))  # type: ignore[call-overload]
        return children[0]

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    # Threads have events of their own.
    monkeypatch.setattr(
        llama, "threading", SimpleNamespace(Event=Interrupted, Thread=threading.Thread)
    )
    monkeypatch.setattr(llama.subprocess, "Popen", start_slowly)
    with pytest.raises(KeyboardInterrupt), LlamaServer(model, n_ctx=32, threads=1):
        pass
    assert children[0].returncode == -signal.SIGKILL


def test_it_ends_with_its_parent(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys, threading; from pathlib import Path\n"
        "from jetson_ft.export.llama import LlamaServer\n"
        "server = LlamaServer(Path(sys.argv[1]), n_ctx=32, threads=1)\n"
        # The thread that starts it may end before.
        "thread = threading.Thread(target=server.__enter__); thread.start(); thread.join()\n"
        "print(server._process.pid, server.is_alive, flush=True); threading.Event().wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    number, alive = parent.stdout.readline().split()
    assert alive == "True"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(number)) and time.monotonic() < deadline:
        time.sleep(0.05)
    exists = psutil.pid_exists(int(number))
    assert not exists or psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"hello", "invalid magic"), (None, "file bounds|read"), (b"", "magic|read|empty")],
)
def test_a_damaged_file_is_named(
    model: Path, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(model.read_bytes()[:-4000] if content is None else content)
    with (
        pytest.raises(UserError, match="can't load the model: .*" + f"({reason})") as error,
        LlamaServer(file, n_ctx=32),
    ):
        pass
    assert str(file) in str(error.value)


def test_a_lora_file_that_is_none_is_named(model: Path) -> None:
    with pytest.raises(UserError, match="LoRA file"), LlamaServer(model, {"a": model}, n_ctx=32):
        pass


def test_another_port_is_taken_where_one_is_in_use(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlamaServer(model, n_ctx=32, threads=1) as first:
        start = LlamaServer._start

        def start_on_a_used_port(server: LlamaServer) -> None:
            ports.append(server.port)
            start(server)
            if len(ports) == 1:
                server.close()
                server._log.append("couldn't bind HTTP server socket")

        ports: list[int] = []
        monkeypatch.setattr(LlamaServer, "_start", start_on_a_used_port)
        with LlamaServer(model, n_ctx=32, threads=1) as second:
            assert len(ports) == 2
            assert second.port != first.port


def test_a_program_gets_every_setting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'for word; do echo "<$word>"; done; echo "key $LLAMA_API_KEY"; exit 3'
    monkeypatch.setenv(llama.PROGRAM, str(_program(tmp_path / "server", "9000", body)))
    lora = tmp_path / 'with "quotes", and comma.gguf'
    server = LlamaServer(model, {"a": lora, "b": model}, n_ctx=10, n_parallel=3)
    with pytest.raises(UserError, match="exit code 3"), server:
        pass
    words = [line[1:-1] for line in server.log.splitlines() if line.startswith("<")]
    pairs = dict(itertools.pairwise(words))
    assert pairs["--model"] == str(model)
    assert (pairs["--host"], pairs["--ctx-size"], pairs["--parallel"]) == ("127.0.0.1", "30", "3")
    assert pairs["--lora"] == f'"{str(lora).replace(chr(34), chr(34) * 2)}","{model}"'
    assert {"--lora-init-without-apply", "--no-slots", "--offline"} < set(words)
    assert server.api_key not in words and f"key {server.api_key}" in server.log


def test_an_old_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama.PROGRAM, str(_program(tmp_path / "server", "8145", "")))
    with pytest.raises(UserError, match="build 8145; 8146"):
        find_program()
    monkeypatch.setenv(llama.PROGRAM, str(_program(tmp_path / "server", "8146", "")))
    assert find_program() == str((tmp_path / "server").resolve())


def test_a_program_in_path_comes_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(llama.PROGRAM)
    program = _program(tmp_path / "llama-server", "9000", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_program() == str(program.resolve())


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama.PROGRAM, "/nowhere/llama-server")
    with pytest.raises(UserError, match="no such program"):
        find_program()


def test_without_llama_cpp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="jetson-ft\\[export\\]"):
        find_program()
