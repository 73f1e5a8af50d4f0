"""Sensors by way of a program that goes on writing lines: tegrastats, nvidia-smi."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable

from jetson_ft.device import tegrastats as jetson
from jetson_ft.device.reading import Reading, temperatures

_SECONDS = 2  # between lines
_SILENT_SECONDS = 12.0  # until a program that says nothing counts as broken
_MIB = 2**20


class Lines:
    """A program that writes a line every few seconds; what it wrote last is taken."""

    def __init__(self, command: list[str], parse: Callable[[list[str]], Reading]) -> None:
        self._parse = parse
        self._text, self._said_at = "", time.monotonic()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        assert self._process.stdout
        self._pipe = self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)

    def read(self) -> Reading:
        """From the last whole lines.

        Raises:
            OSError: the program has ended, or says nothing any more.
        """
        now = time.monotonic()
        self._said_at = now if self._take() else self._said_at
        if self._process.poll() is not None or now - self._said_at > _SILENT_SECONDS:
            raise OSError("no more lines")
        *lines, _ = self._text.split("\n")
        return self._parse(lines[-16:])

    def _take(self) -> bool:
        """Whether there was something new; keeps the end alone."""
        found = False
        while True:
            try:
                piece = os.read(self._pipe, 65536)
            except BlockingIOError:
                return found
            if not piece:
                return found
            found = True
            self._text = (self._text + piece.decode("utf-8", "replace"))[-16384:]

    def close(self) -> None:
        """Ends the program."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


_SMI_FIELDS = (
    "index", "utilization.gpu", "clocks.sm", "memory.used", "memory.total", "temperature.gpu",
    "power.draw",
)  # fmt: skip


def tegrastats(program: str) -> Lines:
    """NVIDIA's monitor of Jetsons."""
    command = [program, "--interval", str(1000 * _SECONDS)]
    return Lines(command, lambda lines: jetson.parse(lines[-1] if lines else ""))


def nvidia_smi(program: str, gpus: int) -> Lines:
    """NVIDIA's monitor of GPUs with a memory of their own, for the first `gpus` of them."""
    fields = f"--query-gpu={','.join(_SMI_FIELDS)}"
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    # One of several processes is shown its own alone.
    chosen = named[:gpus] if all(named) and len(named) >= gpus else map(str, range(gpus))
    command = [program, fields, "--format=csv,noheader,nounits", f"--id={','.join(chosen)}"]
    return Lines([*command, f"--loop={_SECONDS}"], of_smi)


def of_smi(lines: list[str]) -> Reading:
    """nvidia-smi's CSV; of several GPUs the sums, the mean load, the hottest."""
    newest: dict[str, list[float | None]] = {}
    for line in lines:
        index, *cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(_SMI_FIELDS) - 1:
            newest[index] = [_figure(cell) for cell in cells]
    columns = list(zip(*newest.values(), strict=True)) or [()] * (len(_SMI_FIELDS) - 1)
    load, clock, used, total, heat, watts = ([v for v in c if v is not None] for c in columns)
    whole = watts and len(watts) == len(newest)  # a sum without one of them would mislead
    return Reading(
        source="nvidia-smi",
        gpu_load=sum(load) / len(load) if load else None,
        gpu_mhz=max(clock, default=None),
        memory_used=int(sum(used) * _MIB) if used else None,
        memory_total=int(sum(total) * _MIB) if total else None,
        temperatures=temperatures({"gpu": max(heat)}) if heat else {},
        rails={"GPU": sum(watts)} if whole else {},
    )


def _figure(text: str) -> float | None:
    """A number; None for what the tool writes instead (`[N/A]`, `ERR!`)."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
