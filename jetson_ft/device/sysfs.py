"""A Jetson's sensors as the kernel's files show them; they need no other program and no rights.

Every function takes the folder that stands for `/`, and leaves out what can't be read: zones of
sleeping units refuse with EAGAIN, and paths have moved from JetPack to JetPack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from jetson_ft.device.reading import Reading, rails, temperatures

_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/platform/bus@0/17000000.gpu/load",
    "sys/devices/platform/17000000.ga10b/load",
    "sys/devices/gpu.0/load",
)
_CLOCKS = ("17000000.gpu", "17000000.ga10b", "gpu-gpc-0")  # below sys/class/devfreq


def read(root: Path) -> Reading:
    """Everything at once."""
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


def has_gpu(root: Path) -> bool:
    """Whether this is a machine that has such files."""
    return bool(gpu_clocks(root)) or gpu_load(root) is not None


def gpu_load(root: Path) -> float | None:
    """Percent; the kernel counts in thousandths."""
    for place in _LOADS:
        found = _number(root / place)
        if found is not None:
            return min(100.0, max(0.0, found / 10))
    return None


def gpu_clocks(root: Path) -> dict[str, float]:
    """MHz: `cur`, `min`, `max`."""
    for name in _CLOCKS:
        folder = root / "sys/class/devfreq" / name
        found = {key: _number(folder / f"{key}_freq") for key in ("cur", "min", "max")}
        if found["cur"] is not None:
            return {key: value / 1e6 for key, value in found.items() if value is not None}
    return {}


def zones(root: Path) -> dict[str, float]:
    """Temperatures by zone."""
    found = {}
    for folder in _folders(root / "sys/class/thermal", "thermal_zone*"):
        name, value = _text(folder / "type"), _number(folder / "temp")
        if name and value is not None:
            found[name] = value / 1000
    return temperatures(found)


def power(root: Path) -> dict[str, float]:
    """Watts by rail: the INA3221's voltage times current."""
    found = {}
    for folder in _hwmon(root):
        if _text(folder / "name") != "ina3221":
            continue
        for channel in range(1, 4):
            name = _text(folder / f"in{channel}_label")
            volts = _number(folder / f"in{channel}_input")
            amperes = _number(folder / f"curr{channel}_input")
            if name and volts is not None and amperes is not None:
                found[name] = volts * amperes / 1000  # mV x mA is a millionth of a watt
    return rails(found)


def over_current(root: Path) -> dict[str, int]:
    """How often each was met: oc1 voltage too low, oc2 and oc3 too much current."""
    found = {}
    for folder in _hwmon(root):
        for name in ("oc1", "oc2", "oc3"):
            count = _number(folder / f"{name}_event_cnt")
            if count is not None:
                found[name] = int(count)
    return found


def alerts(root: Path) -> tuple[str, ...]:
    """Units whose clocks the firmware lowers at this moment."""
    end = "-throttle-alert"
    folders = _folders(root / "sys/class/thermal", "cooling_device*")
    named = [(_text(folder / "type"), folder) for folder in folders]
    raised = (name for name, folder in named
              if name.endswith(end) and (_number(folder / "cur_state") or 0) > 0)  # fmt: skip
    return tuple(sorted(name.removesuffix(end) for name in raised))


def meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isascii() and words[0].isdigit():
            found[name.strip()] = int(words[0]) * 1024
    return found


def _hwmon(root: Path) -> Iterator[Path]:
    return _folders(root / "sys/class/hwmon", "hwmon*")


def _folders(parent: Path, pattern: str) -> Iterator[Path]:
    try:
        yield from sorted(parent.glob(pattern))
    except OSError:
        return


def _text(path: Path) -> str:
    """Its text without what surrounds it; empty where it can't be read."""
    try:
        return path.read_bytes()[:65536].decode("utf-8", "ignore").strip(" \n\0")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> float | None:
    try:
        found = float(_text(path).split()[0])
    except (ValueError, IndexError):
        return None
    return found if math.isfinite(found) else None
