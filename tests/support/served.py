"""`jetson-ft webui` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest


class Served:
    """A running server: `link` as it prints it, `base` without the token, seconds to start."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "jetson_ft.cli", "webui", "--port", str(port), *options]
        started = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout
        self.link = self.process.stdout.readline().removeprefix("open: ").strip()
        self.base = self.link.partition("?")[0].rstrip("/")
        while self.get("/healthz") is None:
            assert self.process.poll() is None
            time.sleep(0.05)
        self.seconds = time.monotonic() - started

    @property
    def port(self) -> int:
        """The port, on which another server can follow."""
        return int(self.base.rpartition(":")[2])

    def get(self, path: str, **options: Any) -> httpx.Response | None:
        """Return the response; None while the server is not listening."""
        try:
            return httpx.get(self.base + path, timeout=20, **options)
        except httpx.ConnectError:
            return None

    def close(self) -> int:
        """Send Ctrl-C; return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)

    def kill(self) -> None:
        """Kill the process with its group, as a terminal or a service manager does."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Return a function that starts a server in the test's folder; it ends with the test."""
    servers: list[Served] = []

    def start(*options: str, port: int = 0) -> Served:
        servers.append(Served(tmp_path, *options, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
