"""Sensor readings of this machine, from its best source.

A source is a generator of readings that may raise any exception. By preference: the jtop service,
tegrastats, the kernel's files (sysfs), NVML, psutil. When one fails, the next replaces it, so that
reading never raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import Any

import psutil

from jetson_ft.hardware import detect
from jetson_ft.hardware.sensors import sysfs
from jetson_ft.hardware.sensors.reading import Reading, Readings, rails, temperatures

logger = logging.getLogger(__name__)
_INTERVAL = 2  # seconds between the values of jtop, and between the lines of tegrastats
_JTOP_START_SECONDS = 5.0  # for the service to answer
_TEGRASTATS_SILENT_SECONDS = 12.0  # after which a program without output counts as broken
_MIB = 2**20
# Each value is matched with the unit behind it, so that the last value of a truncated line is
# dropped instead of being read in part.
_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
# 0% | 63%@621 | 63%@[621] | 12%@[1300,1300]; older ones write the GPU's clock without brackets
_GPU = re.compile(
    r"\bGR3D_FREQ (\d{1,3})%(?:@(?:\[(\d{1,6})(?:,\d+)*\]|(\d{1,6})(?=\s)))?", re.ASCII
)
_TEMPERATURE = re.compile(r"(?<![\w@])([A-Za-z]\w*)@(-?\d{1,4}(?:\.\d{1,6})?)C\b", re.ASCII)
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (\d{1,9})mW\b", re.ASCII)
_PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")


class Telemetry:
    """The sensors of one machine, for one thread.

    Args:
        root: the folder that stands for `/`.
        path: where programs are searched for; by default PATH.
        gpus: number of discrete GPUs to read.
    """

    def __init__(self, root: Path = Path("/"), path: str | None = None, gpus: int = 1) -> None:
        self.root = root
        self._sources = list(_sources(root, path, gpus))  # the first is in use

    def read(self) -> Reading:
        """Return the values of this moment; None for those that no source has."""
        while self._sources:
            try:
                reading = next(self._sources[0])
            except Exception as error:
                logger.debug("sensors: %s fails: %r; the next is used", self._sources[0], error)
                self.close()
                continue
            counts, alerts = sysfs.over_current(self.root), sysfs.alerts(self.root)
            return replace(reading, over_current=counts, alerts=alerts)
        return Reading("none")

    def close(self) -> None:
        """Close the source; a later `read` uses the next one."""
        if self._sources:
            with contextlib.suppress(Exception):  # a source that has failed may fail again
                self._sources.pop(0).close()


def _sources(root: Path, path: str | None, gpus: int) -> Iterator[Readings]:
    """Yield the sources that this machine may have, best first."""
    if (root / "run/jtop.sock").exists():
        yield _jtop_readings()
    if tegrastats := shutil.which("tegrastats", path=path):
        yield _tegrastats_readings(tegrastats)
    if sysfs.gpu_clocks(root) or sysfs.gpu_load(root) is not None:
        yield (sysfs.read(root) for _ in repeat(None))
    if detect.has_nvidia_driver(root, path):
        yield _nvml_readings(gpus)
    yield _psutil_readings()


def _jtop_readings() -> Readings:
    """Yield the values of the jtop service, which refuses a client of another version."""
    jtop: Any = import_module("jtop")  # package jetson-stats
    clients: list[Any] = []

    def start() -> None:
        with contextlib.suppress(Exception):  # an empty `clients` is the error
            client = jtop.jtop(interval=_INTERVAL)
            client.start()
            clients.append(client)

    # In a thread, because `start` waits forever for a service that hangs.
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(_JTOP_START_SECONDS)
    if not clients:
        raise OSError("the jtop service doesn't answer, or has another version")
    with contextlib.closing(clients[0]) as client:
        while client.ok(spin=True):
            yield parse_jtop(client.gpu, client.memory, client.power, client.temperature)
    raise OSError("the jtop service has ended")


def parse_jtop(gpu: Any, memory: Any, power: Any, temperature: Any) -> Reading:
    """Return the reading of the dictionaries of jtop's client: KB, kHz and mW."""
    first_gpu: Any = next(iter(gpu.values()), {})
    clock, ram = first_gpu.get("freq", {}).get("cur"), memory.get("RAM", {})
    milliwatts = {name: float(rail["power"]) for name, rail in power.get("rail", {}).items()}
    total = power.get("tot", {})
    if "name" in total:  # without a name it is the sum of some of the rails
        milliwatts[total["name"]] = float(total["power"])
    online = {name: s for name, s in temperature.items() if s.get("online", True)}
    return Reading(
        source="jtop",
        gpu_load=first_gpu.get("status", {}).get("load"),
        gpu_mhz=clock / 1000 if clock is not None else None,
        memory_used=ram["used"] * 1024 if "used" in ram else None,
        memory_total=ram["tot"] * 1024 if "tot" in ram else None,
        temperatures=temperatures({name: float(s["temp"]) for name, s in online.items()}),
        rails=rails(milliwatts),
    )


def _tegrastats_readings(program: str) -> Readings:
    """Yield the reading of the last complete line, an empty one before the first."""
    with subprocess.Popen(
        [program, "--interval", str(1000 * _INTERVAL)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
    ) as process:  # fmt: skip
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        text, output_at = "", time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if output := process.stdout.read():
                    text = (text + output.decode("utf-8", "replace"))[-16384:]
                    output_at = now
                silent = now - output_at > _TEGRASTATS_SILENT_SECONDS
                if process.poll() is not None or silent:
                    raise OSError("tegrastats writes no more lines")
                *lines, _ = text.split("\n")
                yield parse_tegrastats(lines[-1] if lines else "")
        finally:
            process.kill()


def parse_tegrastats(line: str) -> Reading:
    """Return the reading of a line, which may be truncated; each JetPack writes another form."""
    ram, gpu = _RAM.search(line), _GPU.search(line)
    clock = (gpu[2] or gpu[3]) if gpu else None
    return Reading(
        source="tegrastats",
        gpu_load=float(gpu[1]) if gpu else None,
        gpu_mhz=float(clock) if clock else None,
        memory_used=int(ram[1]) * _MIB if ram else None,
        memory_total=int(ram[2]) * _MIB if ram else None,
        temperatures=temperatures({name: float(v) for name, v in _TEMPERATURE.findall(line)}),
        rails=rails({name: float(value) for name, value in _RAIL.findall(line)}),
    )


def _nvml_readings(gpus: int) -> Readings:
    """Yield sums over discrete GPUs: those that CUDA_VISIBLE_DEVICES names, or the first ones."""
    import pynvml  # the driver's management library; package nvidia-ml-py

    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    # With one process per GPU, a process may see its own GPU only: take the first ones then.
    if len(names) < gpus or not all(names):
        names = list(map(str, range(gpus)))
    pynvml.nvmlInit()
    try:
        while True:
            rows = [_query_gpu(pynvml, name) for name in names[:gpus]]
            columns = ([v for v in column if v is not None] for column in zip(*rows, strict=True))
            load, clock, used, total, degrees, milliwatts = columns
            if not (load or clock or used or degrees or milliwatts):
                raise OSError("NVML returns no values")
            complete = len(milliwatts) == gpus  # a sum that lacks a GPU would be wrong
            yield Reading(
                source="nvml",
                gpu_load=sum(load) / len(load) if load else None,
                gpu_mhz=max(clock, default=None),
                memory_used=sum(used) if used else None,
                memory_total=sum(total) if total else None,
                temperatures=temperatures({"gpu": max(degrees)}) if degrees else {},
                rails=rails({"GPU": sum(milliwatts)}) if complete else {},
            )
    finally:
        pynvml.nvmlShutdown()


def _query_gpu(nvml: Any, index_or_uuid: str) -> tuple[Any, ...]:
    """Return load, clock, used and total memory, temperature, milliwatts; None: unknown."""
    if index_or_uuid.isdecimal():
        handle = nvml.nvmlDeviceGetHandleByIndex(int(index_or_uuid))
    else:
        handle = nvml.nvmlDeviceGetHandleByUUID(index_or_uuid)

    def query(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, f"nvmlDeviceGet{name}")(handle, *arguments)
        except nvml.NVMLError:  # not every GPU has every sensor
            return None

    # Version 2 leaves the driver's own share out of what is used.
    load, memory = query("UtilizationRates"), query("MemoryInfo", nvml.nvmlMemory_v2)
    clock = query("ClockInfo", nvml.NVML_CLOCK_SM)
    degrees = query("Temperature", nvml.NVML_TEMPERATURE_GPU)
    used, total = (memory.used, memory.total) if memory else (None, None)
    return load and load.gpu, clock, used, total, degrees, query("PowerUsage")


def _psutil_readings() -> Readings:
    """Yield memory and processor temperature; disks and network cards have sensors too."""
    while True:
        memory = psutil.virtual_memory()
        chips: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
        chip = next(filter(chips.get, _PROCESSOR_SENSORS), None)
        degrees = {"cpu": max(sensor.current for sensor in chips[chip])} if chip else {}
        yield Reading(
            source="psutil",
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            temperatures=temperatures(degrees),
        )
