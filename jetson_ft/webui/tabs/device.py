"""The Device tab: the doctor's findings, and gauges of what the machine does at present.

The tab's script fetches both as fragments of HTML, the gauges only while the tab is shown.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from jetson_ft.errors import Message, UserError, _
from jetson_ft.hardware import cgroup, jetpack
from jetson_ft.hardware.sensors.reading import THROTTLES_AT, Reading
from jetson_ft.hardware.sensors.source import Telemetry
from jetson_ft.webui import api
from jetson_ft.webui.cli_json import run_cli_json
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render

_CACHE_SECONDS = 300.0  # after which opening the tab examines again
_READ_SECONDS = 1.0  # between two readings, however many pages are open
_LOAD_SECONDS = 0.1  # over which the processor's load is taken
_IDLE_SECONDS = 20.0  # without a page that shows the gauges, after which the sensors are closed
_GIB = 2.0**30
_ORDER = ("failure", "warning", "ok")
# A fix that is a command has no other text; in others, commands stand between backticks.
_COMMAND = re.compile(r"(sudo|make|git|export|unset) .+", re.DOTALL)


def router(runs: Path) -> APIRouter:
    """Return the routes of the tab; `runs` is the folder of runs, whose disk is examined."""
    routes, doctor, gauges = APIRouter(), Doctor(runs), Gauges()

    @routes.get("/live/{language}/device")
    def findings(request: Request, language: str, opened: bool = False) -> Response:
        if opened:  # not while the tab stays open: the examination works on the GPU
            doctor.examine(_CACHE_SECONDS)
        return api.fragment(request, doctor.html(Locale(language)))

    @routes.post("/device/examine")
    def examine() -> HTMLResponse:
        doctor.examine()
        return HTMLResponse("")

    @routes.get("/live/{language}/gauges")
    def values(language: str) -> HTMLResponse:
        return HTMLResponse(render("gauges.jinja", Locale(language), gauges=gauges.read()))

    return routes


def build() -> None:
    """Add the place that the tab's script fills."""
    places = '<div id="device-findings"></div><div id="device-gauges"></div>'
    gr.HTML(f'<div id="device-page">{places}</div>', apply_default_css=False)


class Doctor:
    """The doctor's findings, examined in the background and kept for all pages."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._result: dict[str, Any] = {}
        self._error: UserError | None = None
        self._examined_at = float("-inf")  # monotonic
        self._lock = threading.Lock()
        self._examining: threading.Thread | None = None

    def examine(self, max_age: float = 0.0) -> None:
        """Start an examination, unless one runs or the findings are younger, in seconds."""
        with self._lock:
            is_running = self._examining is not None and self._examining.is_alive()
            if is_running or time.monotonic() - self._examined_at < max_age:
                return
            self._examining = threading.Thread(target=self._run, daemon=True, name="doctor")
            self._examining.start()

    def html(self, t: Locale) -> str:
        """Return the findings, those that need something first."""
        examining = self._examining is not None and self._examining.is_alive()
        checks = sorted(
            self._result.get("checks", []), key=lambda check: _ORDER.index(check["status"])
        )
        return render(
            "findings.jinja", t, examining=examining, error=self._error, checks=checks,
            works=self._result.get("works"), fix_parts=fix_parts,
        )  # fmt: skip

    def _run(self) -> None:
        runs = str(self._runs.absolute())
        try:
            self._result, self._error = run_cli_json("doctor", "--json", "--runs", runs), None
        except UserError as error:
            self._error = error
        self._examined_at = time.monotonic()


def fix_parts(text: str) -> list[tuple[str, str]]:
    """Return the parts of a fix with their kind: `text`, `code`, or `command`, which is copied."""
    if _COMMAND.fullmatch(text):
        return [(text, "command")]
    parts = []
    for number, part in enumerate(text.split("`")):
        is_command = " " in part and not part.startswith("-")
        parts.append((part, "text" if number % 2 == 0 else "command" if is_command else "code"))
    return [(part, kind) for part, kind in parts if part]


@dataclass(frozen=True)
class Gauge:
    """A value for people; `percent` of the limit that counts, None where none is known."""

    title: str
    value: str
    percent: float | None = None
    limit: str | Message = ""
    is_load: bool = False  # which may be at its limit

    @property
    def level(self) -> str:
        """`high` or `full` near a limit that is to be avoided."""
        percent = 0.0 if self.is_load else self.percent or 0.0
        return "full" if percent >= 95 else "high" if percent >= 85 else ""


class Gauges:
    """What this machine's sensors show, read for all pages at once."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._telemetry: Telemetry | None = None
        self._gauges: list[Gauge] = []
        self._read_at = float("-inf")  # monotonic
        self._closing: threading.Timer | None = None

    def read(self) -> list[Gauge]:
        """Return the gauges for which this machine has a sensor, at most a second old."""
        with self._lock:
            if time.monotonic() - self._read_at > _READ_SECONDS:
                self._telemetry = self._telemetry or Telemetry(self._root)
                self._gauges = list(_gauges(self._telemetry.read(), self._root))
                self._read_at = time.monotonic()
            if self._closing:
                self._closing.cancel()
            self._closing = threading.Timer(_IDLE_SECONDS, self.close)
            self._closing.daemon = True
            self._closing.start()
            return self._gauges

    def close(self) -> None:
        """Close the sensors: some are programs that run as long as they are read."""
        with self._lock:
            if self._telemetry:
                self._telemetry.close()
            self._telemetry = None


def _gauges(reading: Reading, root: Path) -> Iterator[Gauge]:
    """Yield a gauge for each value that is known."""
    memory, group = psutil.virtual_memory(), cgroup.memory_limit(root)
    total, free = min(memory.total, group.limit), min(memory.available, group.available)
    yield _of_memory(_("Memory"), total - free, total)
    if reading.source == "nvml" and reading.memory_used and reading.memory_total:
        yield _of_memory(_("GPU memory"), reading.memory_used, reading.memory_total)
    if reading.gpu_load is not None:
        clock = f" · {reading.gpu_mhz:.0f} MHz" if reading.gpu_mhz else ""
        value = f"{reading.gpu_load:.0f} %{clock}"
        yield Gauge(_("GPU"), value, reading.gpu_load, "100 %", is_load=True)
    load = psutil.cpu_percent(_LOAD_SECONDS)
    yield Gauge(_("Processor"), f"{load:.0f} %", load, "100 %", is_load=True)
    if reading.watts is not None:
        modes = jetpack.read_power_modes(root)
        limit = re.match(r"\d{1,4}(?=W)", modes.names[modes.current]) if modes else None
        percent = 100 * reading.watts / float(limit[0]) if limit else None
        yield Gauge(_("Power"), f"{reading.watts:.1f} W", percent, f"{limit[0]} W" if limit else "")
    if reading.temperature is not None:
        slows_down = "tj" in reading.temperatures  # the only sensor whose limit is known
        percent = 100 * reading.temperature / THROTTLES_AT if slows_down else None
        limit_text = Message(_("slower from {limit:.0f} °C"), {"limit": THROTTLES_AT})
        value = f"{reading.temperature:.0f} °C"
        yield Gauge(_("Temperature"), value, percent, limit_text if slows_down else "")


def _of_memory(title: str, used: float, total: float) -> Gauge:
    value, limit = f"{used / _GIB:.1f} GiB", f"{total / _GIB:.1f} GiB"
    return Gauge(title, value, 100 * used / total, limit)
