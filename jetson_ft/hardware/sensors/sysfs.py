"""A Jetson's sensors in the kernel's files, which need no other program and no rights.

`root` is the folder that stands for `/`. A file that can't be read is left out: zones of sleeping
units refuse with EAGAIN, and paths differ between versions of JetPack.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from jetson_ft.hardware.sensors.reading import Reading, rails, temperatures

_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
    "sys/devices/platform/17000000.ga10b/load",
    "sys/devices/gpu.0/load",
)
_CLOCKS = ("17000000.gpu", "17000000.ga10b", "gpu-gpc-0")  # below sys/class/devfreq


def read(root: Path) -> Reading:
    """Return what the kernel's files say; a value without a file is missing."""
    memory = meminfo(root)
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    return Reading(
        source="sysfs",
        gpu_load=gpu_load(root),
        gpu_mhz=gpu_clocks(root).get("cur"),
        memory_used=total - available if total and available is not None else None,
        memory_total=total,
        temperatures=zones(root),
        rails=power(root),
    )


def gpu_load(root: Path) -> float | None:
    """Return percent; the kernel counts in thousandths."""
    for path in _LOADS:
        if (load := _number(root / path)) is not None:
            return min(100.0, max(0.0, load / 10))
    return None


def gpu_clocks(root: Path) -> dict[str, float]:
    """Return `cur`, `min` and `max` in MHz; empty: unknown."""
    for name in _CLOCKS:
        folder = root / "sys/class/devfreq" / name
        clocks = {key: _number(folder / f"{key}_freq") for key in ("cur", "min", "max")}
        if clocks["cur"] is not None:
            return {key: value / 1e6 for key, value in clocks.items() if value is not None}
    return {}


def zones(root: Path) -> dict[str, float]:
    """Return the temperature of each thermal zone."""
    degrees = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        name, value = read_text(zone / "type"), _number(zone / "temp")
        if name and value is not None:
            degrees[name] = value / 1000
    return temperatures(degrees)


def power(root: Path) -> dict[str, float]:
    """Return watts by rail: voltage times current of the INA3221 sensors."""
    milliwatts = {}
    for label in sorted(root.glob("sys/class/hwmon/hwmon*/in[123]_label")):
        chip, channel, name = label.parent, label.name[2], read_text(label)
        volts = _number(chip / f"in{channel}_input")  # both in thousandths
        amperes = _number(chip / f"curr{channel}_input")
        if read_text(chip / "name") != "ina3221" or not name or volts is None or amperes is None:
            continue
        milliwatts[name] = volts * amperes / 1000
    return rails(milliwatts)


def over_current(root: Path) -> dict[str, int]:
    """Return the counters of events: oc1 voltage too low, oc2 and oc3 current too high."""
    files = sorted(root.glob("sys/class/hwmon/hwmon*/oc[123]_event_cnt"))
    counts = {path.name[:3]: _number(path) for path in files}
    return {name: int(count) for name, count in counts.items() if count is not None}


def alerts(root: Path) -> tuple[str, ...]:
    """Return the units whose clocks the firmware lowers at this moment."""
    devices = root.glob("sys/class/thermal/cooling_device*")
    active = [read_text(path / "type") for path in devices if _number(path / "cur_state")]
    suffix = "-throttle-alert"
    return tuple(sorted(name.removesuffix(suffix) for name in active if name.endswith(suffix)))


def meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    lines = read_text(root / "proc/meminfo")
    kibibytes = re.findall(r"^(\w+): *(\d{1,15})\b", lines, re.ASCII | re.MULTILINE)
    return {name: int(size) * 1024 for name, size in kibibytes}


def read_text(path: Path) -> str:
    """Return the stripped text of a file, 1 MiB at most; empty where it can't be read."""
    try:
        return path.read_bytes()[: 2**20].decode("utf-8", "ignore").strip(" \n\0")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> float | None:
    try:
        number = float(read_text(path).split()[0])
    except (ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None
