"""What can be told without torch: in a second, except for the hub, which gets three."""

from __future__ import annotations

import grp
import os
import shutil
import stat
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from jetson_ft import hub
from jetson_ft.device import jetpack, probe, sysfs
from jetson_ft.device.doctor.finding import Finding, Machine, failure, ok, warning
from jetson_ft.device.reading import Reading
from jetson_ft.device.telemetry import Telemetry
from jetson_ft.paths import cache_root, existing_parent

_GIB = 2**30
# Bytes free below which nothing fits, and below which it gets tight.
_MEMORY, _MEMORY_TIGHT, _MEMORY_TIGHT_ON_BOARD = 1 * _GIB, 2 * _GIB, 4 * _GIB
_DISK, _DISK_TIGHT = _GIB // 2, 5 * _GIB
_SENSOR_SECONDS = 3.0  # for a program to say its first line
# The GPU's device files; which of them there are differs from JetPack to JetPack.
_MUST_BE_THERE = "dev/nvmap"
_NODES = (
    _MUST_BE_THERE, "dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvgpu/igpu0/ctrl",
    "dev/dri/renderD128",
)  # fmt: skip
_L4T_THAT_CANT_ALLOCATE = (36, 4, 7)


def examine(machine: Machine) -> Iterator[Finding]:
    """Of a Jetson all of it, elsewhere what is of use there."""
    yield _board(machine)
    if machine.board:
        yield from _software(machine)
        yield from _power(machine)
        yield _access(machine)
    yield _memory(machine)
    if machine.board:
        yield from _swap(machine)
    yield from _disks(machine)
    yield from _sensors(machine)
    yield _hub()


def _board(machine: Machine) -> Finding:
    if machine.board:
        total = sysfs.meminfo(machine.root).get("MemTotal", 0)
        return ok("board.jetson", name=machine.board, memory=f"{total / _GIB:.1f}")
    cores = probe.usable_cores()
    return ok("board.other", name=probe.cpu_name(_read(machine.root / "proc/cpuinfo")), cores=cores)


def _software(machine: Machine) -> Iterator[Finding]:
    found = machine.l4t
    if found is None:
        yield warning("jetpack.unknown")
        return
    values = {"l4t": found, "jetpack": found.jetpack or "?"}
    if found.major == 6:
        yield ok("jetpack.supported", **values)
    elif found.major == 7 or found.major == 0:
        yield warning("jetpack.untried", **values)
    else:
        yield failure("jetpack.old", **values)
    if found.numbers == _L4T_THAT_CANT_ALLOCATE:
        yield warning("l4t.allocation", **values)


def _power(machine: Machine) -> Iterator[Finding]:
    modes = jetpack.power_modes(machine.root)
    if modes is None:
        yield warning("power.unknown")
    else:
        fastest = modes.fastest
        values = {"mode": modes.names[modes.current], "best": modes.names[fastest], "id": fastest}
        as_fast = modes.current == fastest
        yield ok("power.fastest", **values) if as_fast else warning("power.slower", **values)
    clocks = sysfs.gpu_clocks(machine.root)
    if {"min", "max"} <= set(clocks):
        key = "clocks.fixed" if clocks["min"] == clocks["max"] else "clocks.follow"
        yield ok(key, low=f"{clocks['min']:.0f}", high=f"{clocks['max']:.0f}")


def _access(machine: Machine) -> Finding:
    if not (machine.root / _MUST_BE_THERE).exists():
        return failure("access.missing", node=f"/{_MUST_BE_THERE}")
    for place in _NODES:
        path = machine.root / place
        if path.exists() and not _may_read(path, machine):
            group = _group(path.stat().st_gid)
            return failure("access.denied", node=f"/{place}", group=group)
    return ok("access.fine")


def _may_read(path: Path, machine: Machine) -> bool:
    """By the file's own rights: `os.access` would ask for this process alone."""
    found = path.stat()
    if machine.user == 0:
        return True
    if found.st_uid == machine.user:
        return bool(found.st_mode & stat.S_IRUSR)
    if found.st_gid in machine.groups:
        return bool(found.st_mode & stat.S_IRGRP)
    return bool(found.st_mode & stat.S_IROTH)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:  # in a container, a number that only the host has a name for
        return str(number)


def _memory(machine: Machine) -> Finding:
    """MemAvailable: on a board the GPU driver's own "free" leaves out the page cache."""
    found = sysfs.meminfo(machine.root)
    free, total = found.get("MemAvailable", 0), found.get("MemTotal", 0)
    values = {"free": f"{free / _GIB:.1f}", "total": f"{total / _GIB:.1f}"}
    tight = _MEMORY_TIGHT_ON_BOARD if machine.board else _MEMORY_TIGHT
    if free < _MEMORY:
        return failure("memory.none", **values)
    if free < tight:
        return warning("memory.board" if machine.board else "memory.little", **values)
    return ok("memory.enough", **values)


def _swap(machine: Machine) -> Iterator[Finding]:
    """zram takes of the very memory that is short; what the GPU holds is never swapped."""
    lines = _read(machine.root / "proc/swaps").splitlines()[1:]
    used = [(words[0], int(words[2])) for words in map(str.split, lines)
            if len(words) > 2 and words[2].isdecimal()]  # fmt: skip
    disks = sum(size for name, size in used if "zram" not in name) * 1024
    zram = sum(size for name, size in used if "zram" in name) * 1024
    if zram:
        yield warning("swap.zram", size=f"{zram / _GIB:.1f}")
    if disks:
        yield ok("swap.disk", size=f"{disks / _GIB:.1f}")
    else:
        yield warning("swap.none")


def _disks(machine: Machine) -> Iterator[Finding]:
    """One line a file system."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    shared: dict[int, list[Path]] = {}
    for place in (machine.runs, cache_root(), Path(home)):
        shared.setdefault(existing_parent(place).stat().st_dev, []).append(place)
    for together in shared.values():
        yield _disk(together)


def _short(path: Path) -> str:
    """With `~` for the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _disk(together: list[Path]) -> Finding:
    """Of the folder for runs, for caches and for models, those that share it."""
    places = ", ".join(map(_short, together))
    parents = [existing_parent(place) for place in together]
    closed = [parent for parent in parents if not os.access(parent, os.W_OK)]
    if closed:
        return failure("disk.closed", place=closed[0])
    free = shutil.disk_usage(parents[0]).free
    values = {"free": f"{free / 10**9:.1f}", "places": places}
    if free < _DISK:
        return failure("disk.full", **values)
    return warning("disk.tight", **values) if free < _DISK_TIGHT else ok("disk.enough", **values)


def _sensors(machine: Machine) -> Iterator[Finding]:
    found = _first_reading(machine)
    known = {"W": found.watts, "°C": found.temperature, "% GPU": found.gpu_load}
    said = ", ".join(f"{value:.0f} {unit}" for unit, value in known.items() if value is not None)
    if said:
        yield ok("sensors.read", source=found.source, said=said)
    elif machine.board:
        yield warning("sensors.none")
    else:
        yield ok("sensors.memory", source=found.source)
    if (machine.root / "run/jtop.sock").exists() and found.source != "jtop":
        yield warning("jtop.silent", version=_jtop_version(), source=found.source)


def _first_reading(machine: Machine) -> Reading:
    telemetry, deadline = Telemetry(machine.root, machine.path), time.monotonic() + _SENSOR_SECONDS
    try:
        while True:
            found = telemetry.read()
            told = found.temperature is not None or found.watts is not None
            if told or found.source == "psutil" or time.monotonic() > deadline:
                return found
            time.sleep(0.05)
    finally:
        telemetry.close()


def _jtop_version() -> str:
    try:
        return metadata.version("jetson-stats")
    except metadata.PackageNotFoundError:
        return "–"


def _hub() -> Finding:
    if hub.told_offline():
        return warning("hub.told")
    address = hub.endpoint()
    if hub.reachable():
        return ok("hub.there", address=address)
    return warning("hub.away", address=address)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return ""
