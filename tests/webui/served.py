"""`jetson-ft webui` as a person starts it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx


class Served:
    """The page's server in a process of its own; `base` is where it listens."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "jetson_ft.cli", "webui", "--port", str(port), *options]
        started = time.monotonic()
        self.process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.link = self.process.stdout.readline().removeprefix("open: ").strip()
        self.base = self.link.partition("?")[0].rstrip("/")
        while self.get("/healthz") is None:
            assert self.process.poll() is None
            time.sleep(0.05)
        self.seconds = time.monotonic() - started

    @property
    def port(self) -> int:
        """Where another server can take over."""
        return int(self.base.rpartition(":")[2])

    def get(self, path: str, **more: Any) -> httpx.Response | None:
        """None while nobody listens."""
        try:
            return httpx.get(self.base + path, timeout=20, **more)
        except httpx.ConnectError:
            return None

    def close(self) -> int:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)

    def kill(self) -> None:
        """Without a word."""
        self.process.kill()
        self.process.wait(20)
