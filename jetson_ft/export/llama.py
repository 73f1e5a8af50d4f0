"""llama.cpp's server in a child process, on loopback: one GGUF model and LoRA files for it.

The program is the `llama-server` that `JETSON_FT_LLAMA_SERVER` names, else the one in PATH (an
image has one that is built for its board), else the package xllamacpp, by `llama_process`.
"""

from __future__ import annotations

import collections
import http.client
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jetson_ft.child_process import PARENT_PROCESS, python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.hardware import detect

PROGRAM = "JETSON_FT_LLAMA_SERVER"  # environment variable; empty: xllamacpp
INSTALL_EXPORT = _('Run: pip install "jetson-ft[export]"')
HOST = "127.0.0.1"
_OLDEST_BUILD = 8146  # without CVE-2026-27940, a heap overflow by a crafted GGUF file
_LOAD_SECONDS = 900
_ATTEMPTS = 5  # with another port each: between its choice and its use another process can take it
_LOG_LINES = 400


class LlamaServer:
    """A running server of llama.cpp with its whole HTTP API; use it as a context manager.

    Its API has no limits of its own on bodies or fields: only trusted code may reach it.

    Args:
        model: GGUF file.
        lora: GGUF files of adapters by name. None applies unless a request says so, by
            `"lora": [{"id": lora_ids[name], "scale": 1.0}]`.
        n_ctx: positions (tokens of prompt and reply) of each request.
        n_parallel: requests that are computed at the same time; memory is reserved for each.
        threads: of the processor; None: `default_threads`.

    Raises:
        UserError: no llama.cpp, a version with known holes, a file that it can't read, or too
            little memory.
    """

    def __init__(
        self,
        model: Path,
        lora: Mapping[str, Path] | None = None,
        *,
        n_ctx: int,
        n_parallel: int = 1,
        threads: int | None = None,
    ) -> None:
        self.model = model
        self.lora_ids = {name: number for number, name in enumerate(lora or {})}
        self._lora = [str(path.resolve()) for path in (lora or {}).values()]
        self.api_key = secrets.token_urlsafe(24)
        self.port = 0
        self._settings = {
            "program": find_program(),
            "model": str(model.resolve()),
            "lora": self._lora,
            "n_ctx": n_ctx * n_parallel,  # llama.cpp divides it among the requests
            "n_parallel": n_parallel,
            "threads": threads or default_threads(),
            "api_key": self.api_key,
        }
        self._log: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._start_error: OSError | None = None
        self._runner: threading.Thread | None = None
        self._closed = False

    @property
    def url(self) -> str:
        """The address, without a slash at its end."""
        return f"http://{HOST}:{self.port}"

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """The newest lines that the process printed."""
        return "\n".join(self._log)

    def __enter__(self) -> LlamaServer:
        for attempt in range(_ATTEMPTS):
            try:
                self._start()
                self._wait_until_ready()
                return self
            except BaseException as error:
                self.close()
                is_port_taken = isinstance(error, UserError) and "couldn't bind" in self.log
                if not is_port_taken or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, also one that the other thread is just starting."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        if self._runner is not None:
            self._runner.join()

    def request(
        self, path: str, body: dict[str, Any] | None = None, timeout: float = 600
    ) -> dict[str, Any]:
        """Return the JSON answer to a POST of `body`, or to a GET where there is none.

        Raises:
            UserError: the server has ended, or refuses the request.
        """
        with self._answer(path, body, timeout) as response:
            text = response.read()
        answer = _parse_object(text)
        if answer is None:
            raise self._refusal(path, response.status, text)
        return answer

    def stream(
        self, path: str, body: dict[str, Any], timeout: float = 600
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the events of the answer to a POST of `body`; closing the iterator ends it.

        Args:
            timeout: seconds without an event.

        Raises:
            UserError: as `request`, also in the middle of the answer.
        """
        rest = b""
        with self._answer(path, body, timeout) as response:
            while part := response.read1():  # `readline` takes a lost connection for the end
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    kind, _separator, data = line.partition(b": ")
                    event = _parse_object(data) or {}
                    if kind == b"error" or "error" in event:
                        raise self._refusal(path, response.status, data)
                    if kind == b"data" and event:
                        yield event

    @contextmanager
    def _answer(
        self, path: str, body: dict[str, Any] | None, timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request, and return the answer; in the context, a lost connection is explained."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        try:
            connection.request(
                "GET" if body is None else "POST",
                path,
                None if body is None else json.dumps(body).encode(),
                headers,
            )
            response = connection.getresponse()
            if response.status != 200:
                raise self._refusal(path, response.status, response.read())
            yield response
        except (OSError, http.client.HTTPException) as error:
            if not self.is_alive:
                raise self._explain_exit() from error
            raise UserError(
                _("llama.cpp's server doesn't answer: {error}"), self.url, error=error
            ) from error
        finally:
            connection.close()

    def _refusal(self, path: str, status: int, text: bytes) -> UserError:
        answer = _parse_object(text) or {}
        detail = answer.get("error", answer)
        message = detail.get("message") if isinstance(detail, dict) else None
        return UserError(
            _("llama.cpp's server refuses a request ({status}): {error}"),
            f"{self.url}{path}",
            status=status,
            error=message or text[:200].decode(errors="replace"),
        )

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = int(free.getsockname()[1])
        self._log.clear()
        self._process, self._closed = None, False
        started = threading.Event()
        # The kernel ends a child with the thread that started it: that thread waits for the child.
        runner = threading.Thread(target=self._run, args=[started], daemon=True)
        runner.start()
        self._runner = runner
        started.wait()

    def _run(self, started: threading.Event) -> None:
        try:
            self._process = subprocess.Popen(
                python_module("jetson_ft.export.llama_process"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace",
                env={**os.environ, PARENT_PROCESS: str(os.getpid())},
            )  # fmt: skip
        except OSError as error:
            self._start_error = error
            return
        finally:
            started.set()
        if self._closed:  # before there was a process to end
            self._process.kill()
        assert self._process.stdin and self._process.stdout
        try:
            # Not among the arguments: every user of the machine can read those.
            self._process.stdin.write(json.dumps({**self._settings, "port": self.port}))
            self._process.stdin.close()
        except OSError:
            pass  # it has ended; its output says why
        for line in self._process.stdout:
            self._log.append(line.rstrip()[:1000])
        self._process.wait()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _LOAD_SECONDS
        while time.monotonic() < deadline:
            if not self.is_alive:
                assert self._runner
                self._runner.join()  # the rest of its output
                raise self._explain_exit()
            try:
                self.request("/v1/models", timeout=10)
                return
            except UserError:
                time.sleep(0.05)
        raise UserError(
            _("llama.cpp's server hasn't loaded the model in {seconds} seconds."),
            str(self.model),
            seconds=_LOAD_SECONDS,
        )

    def _explain_exit(self) -> UserError:
        """Return what ended the process, by its exit code and its last lines."""
        if self._process is None:
            return UserError(
                _("llama.cpp's server can't be started: {error}"), str(self.model),
                _("End other programs."), error=self._start_error,
            )  # fmt: skip
        log, code = self.log, self._process.wait()
        if code == -signal.SIGKILL or re.search(
            r"failed to allocate|unable to allocate|out of memory|bad_alloc|MemoryError", log, re.I
        ):
            return UserError(
                _("llama.cpp's server ran out of memory."), str(self.model),
                _("End other programs, or use a smaller context, fewer requests at a time or a "
                  "smaller file (`--quantize q4_0`)."),
            )  # fmt: skip
        if re.search(r"failed to (load|apply) lora", log):
            return UserError(
                _("llama.cpp can't use the LoRA file: it is damaged, or made for another base."),
                ", ".join(self._lora),
                _("Export it again."),
            )
        reason = re.search(r"(?:gguf_init_\w+|error loading model): (.*)", log)
        if reason or "failed to load model" in log:
            return UserError(
                _("llama.cpp can't load the model: {reason}"), str(self.model),
                _("The file is damaged or of a kind that this version doesn't know. "
                  "Export it again."),
                reason=reason[1] if reason else Message(_("no reason given")),
            )  # fmt: skip
        lines = [line for line in self._log if line.strip()][-3:]
        return UserError(
            _("llama.cpp's server ended unexpectedly (exit code {code}): {lines}"),
            str(self.model),
            code=code,
            lines=" / ".join(lines) or "-",
        )


def _parse_object(text: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None: the text is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def default_threads() -> int:
    """Return the threads of llama.cpp: `OMP_NUM_THREADS` as for torch, else one for each core.

    Its own choice counts the cores of the machine. Threads that wait for each other on cores that
    other programs use are a hundred times slower.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else detect.usable_cores()


def find_program() -> str | None:
    """Return the path of `llama-server`, or None for xllamacpp.

    Raises:
        UserError: neither is installed, or the program is missing or too old.
    """
    name = os.environ.get(PROGRAM, "llama-server")
    program = shutil.which(name) if name else None
    if program:
        _check_version(program)
        return str(Path(program).resolve())
    if name and PROGRAM in os.environ:
        raise UserError(_("There is no such program."), f"{PROGRAM}={name}")
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError(_("llama.cpp is not installed."), "xllamacpp", INSTALL_EXPORT)
    return None


def _check_version(program: str) -> None:
    fix = _("Install a newer one, or set {variable} to nothing: then xllamacpp is used.")
    try:
        result = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            _("The program can't be started: {error}"), program, fix, variable=PROGRAM, error=error
        ) from error
    version = re.search(r"version: b?(\d+)", result.stdout + result.stderr)
    build = int(version[1]) if version else 0
    if build < _OLDEST_BUILD:
        raise UserError(
            _("This llama.cpp is build {build}; {oldest} or newer is needed: older ones have "
              "security holes."),
            program, fix, build=build, oldest=_OLDEST_BUILD, variable=PROGRAM,
        )  # fmt: skip
