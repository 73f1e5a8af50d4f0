"""Checks that need no torch; they take a second, and the Hub's three more at most."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jetson_ft import hub
from jetson_ft.errors import _
from jetson_ft.files import cache_root, existing_parent
from jetson_ft.hardware import cgroup, detect, jetpack
from jetson_ft.hardware.doctor.finding import Finding, Machine, failure, ok, warning
from jetson_ft.hardware.sensors import sysfs
from jetson_ft.hardware.sensors.reading import Reading
from jetson_ft.hardware.sensors.source import Telemetry

_GIB = 2**30
# Free bytes: below the first limit nothing fits, below the second large models don't.
_MEMORY, _MEMORY_LOW, _MEMORY_LOW_ON_BOARD = 1 * _GIB, 2 * _GIB, 4 * _GIB
_DISK, _DISK_LOW = _GIB // 2, 5 * _GIB
_SENSOR_SECONDS = 3.0  # that a program may need for its first line
_L4T_WITH_ALLOCATION_FAULT = (36, 4, 7)
_MAKE_SWAP_FILE = (
    "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo "
    "swapon /swapfile && echo '/swapfile none swap sw 0 0' | sudo tee -a /etc/fstab"
)
_UPGRADE_L4T = (
    "sudo sed -i 's/r36\\.4/r36.5/' /etc/apt/sources.list.d/nvidia-l4t-apt-source.list && "
    "sudo apt update && sudo apt dist-upgrade"
)


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield the findings; those on a Jetson's software only on a Jetson."""
    yield _board(machine)
    if machine.board:
        yield from _software(machine)
        yield from _power(machine)
        yield _access(machine)
    yield from _memory(machine)
    if machine.board:
        yield from _swap(machine)
    yield from _disks(machine)
    yield from _sensors(machine)
    yield _hub()


def _board(machine: Machine) -> Finding:
    if machine.board:
        total = sysfs.meminfo(machine.root).get("MemTotal", 0) / _GIB
        return ok("board.jetson", _("{name}, {memory:.1f} GiB"), name=machine.board, memory=total)
    name = detect.cpu_name(sysfs.read_text(machine.root / "proc/cpuinfo"))
    text = _("not a Jetson: {name}, {cores} cores")
    return ok("board.other", text, name=name, cores=detect.usable_cores())


def _software(machine: Machine) -> Iterator[Finding]:
    l4t = jetpack.read_l4t(machine.root)
    if l4t is None:
        text = _("unknown: /etc/nv_tegra_release can't be read")
        fix = _("In a container: `docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro …`")
        yield warning("jetpack.unknown", text, fix)
        return
    values = {"l4t": str(l4t), "jetpack": l4t.jetpack or "?"}
    if l4t.series == 36:
        yield ok("jetpack.supported", _("{jetpack} (L4T {l4t})"), **values)
    elif l4t.series == 39:
        text = _("{jetpack} (L4T {l4t}): set-up has packages for it, untried on a board")
        yield warning("jetpack.untried", text, **values)
    elif l4t.series == 38:
        text = _("{jetpack} (L4T {l4t}) is for Jetson Thor only; set-up has no packages for it")
        fix = _("Flash JetPack 7.2: https://developer.nvidia.com/embedded/jetpack")
        yield warning("jetpack.thor_only", text, fix, **values)
    elif l4t.major == 0:
        text = _("{jetpack} (L4T {l4t}) is unknown to this program")
        yield warning("jetpack.unknown_series", text, **values)
    else:
        text = _("{jetpack} (L4T {l4t}) is not supported: Python and CUDA are too old for PyTorch")
        fix = _("Flash JetPack 6.2 or 7.2: https://developer.nvidia.com/embedded/jetpack")
        yield failure("jetpack.old", text, fix, **values)
    if l4t.numbers == _L4T_WITH_ALLOCATION_FAULT:
        text = _("L4T {l4t} refuses large allocations with enough memory free; 36.5 fixes it")
        yield warning("l4t.allocation", text, _UPGRADE_L4T, **values)


def _power(machine: Machine) -> Iterator[Finding]:
    modes = jetpack.read_power_modes(machine.root)
    if modes is None:
        text = _("unknown: the files of nvpmodel can't be read")
        yield warning("power.unknown", text, "sudo nvpmodel -q")
    elif modes.current == modes.fastest:
        yield ok("power.fastest", _("{mode}, the fastest"), mode=modes.names[modes.current])
    else:
        mode, best = modes.names[modes.current], modes.names[modes.fastest]
        text, fix = _("{mode}; {best} is faster"), "sudo nvpmodel -m {id}"
        yield warning("power.slower", text, fix, mode=mode, best=best, id=modes.fastest)
    clocks = sysfs.gpu_clocks(machine.root)
    low, high = clocks.get("min"), clocks.get("max")
    if high is not None and low == high:
        yield ok("clocks.fixed", _("fixed at {high:.0f} MHz"), high=high)
    elif high is not None and low is not None:
        text = _("{low:.0f} to {high:.0f} MHz by load; `sudo jetson_clocks` sets the highest")
        yield ok("clocks.dynamic", text, low=low, high=high)


def _access(machine: Machine) -> Finding:
    if not (machine.root / detect.JETSON_MEMORY_NODE).exists():
        node = f"/{detect.JETSON_MEMORY_NODE}"
        fix = _("In a container: `docker run --runtime nvidia …`; else reinstall NVIDIA's drivers: "
                "`sudo apt install --reinstall nvidia-l4t-core nvidia-l4t-cuda`")  # fmt: skip
        return failure("access.missing", _("{node} not found"), fix, node=node)
    for node in detect.JETSON_NODES:
        path = machine.root / node
        if path.exists() and not os.access(path, os.R_OK):
            try:
                group = path.group()
            except KeyError:  # in a container, a group that only the host has a name for
                group = str(path.stat().st_gid)
            text = _("{node} can't be read: it is for the group {group}")
            fix = _(
                "`sudo usermod -aG video,render $USER`, then log in again "
                "(in a container: `docker run --group-add $(stat -c %g {node}) …`)"
            )
            return failure("access.denied", text, fix, node=f"/{node}", group=group)
    return ok("access.readable", _("those of the GPU can be read"))


def _memory(machine: Machine) -> Iterator[Finding]:
    """Check MemAvailable and control groups: the GPU's driver counts the page cache as used."""
    sizes, limit = sysfs.meminfo(machine.root), cgroup.memory_limit(machine.root)
    free, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
    more, is_limited = _("Close other programs."), limit.available < free
    if limit.limit < total:
        left, gib = limit.available / _GIB, limit.limit / _GIB
        text = _("{limit:.1f} GiB for this container or service, {left:.1f} GiB of it left")
        yield ok("limit.set", text, limit=gib, left=left)
    if is_limited:
        free, total = limit.available, limit.limit
        more = _("Raise the limit: `docker run --memory`, or MemoryMax of systemd.")
    values: dict[str, Any] = {"free": free / _GIB, "total": total / _GIB}
    if free < _MEMORY:
        text = _("{free:.1f} of {total:.1f} GiB free: not enough to train anything")
        yield failure("memory.too_little", text, more, **values)
    elif free >= (_MEMORY_LOW_ON_BOARD if machine.board else _MEMORY_LOW):
        yield ok("memory.enough", _("{free:.1f} of {total:.1f} GiB free"), **values)
    elif is_limited:
        text = _("{free:.1f} of {total:.1f} GiB free: too little for large models")
        yield warning("memory.low_by_limit", text, more, **values)
    elif machine.board:
        text = _("{free:.1f} of {total:.1f} GiB free; about 0.8 GB more without the desktop")
        yield warning("memory.low_on_board", text, "sudo init 3", **values)
    else:
        text = _("{free:.1f} of {total:.1f} GiB free: enough for the embedded model only")
        yield warning("memory.low", text, more, **values)


def _swap(machine: Machine) -> Iterator[Finding]:
    """Check for zram, which uses the memory that is short; the GPU's memory is never swapped."""
    sizes = {"zram": 0.0, "disk": 0.0}
    for line in sysfs.read_text(machine.root / "proc/swaps").splitlines()[1:]:
        words = line.split()
        if len(words) > 2 and words[2].isdecimal():
            sizes["zram" if "zram" in words[0] else "disk"] += int(words[2]) * 1024 / _GIB
    if sizes["zram"]:
        text = _("{size:.1f} GiB of zram, which uses memory that the GPU needs")
        fix = "sudo systemctl disable --now nvzramconfig"
        yield warning("swap.zram", text, fix, size=sizes["zram"])
    if sizes["disk"]:
        yield ok("swap.disk", _("{size:.1f} GiB on a disk"), size=sizes["disk"])
    else:
        text = _("none on a disk; nothing can be moved out of memory when it gets short")
        yield warning("swap.none", text, _MAKE_SWAP_FILE)


def _disks(machine: Machine) -> Iterator[Finding]:
    """Check each file system of the folders for runs, caches and models."""
    disks: dict[int, list[Path]] = {}
    for folder in (machine.runs, cache_root(), hub.cache_folder()):
        disks.setdefault(existing_parent(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        yield _disk(folders)


def _disk(folders: list[Path]) -> Finding:
    parents = [existing_parent(folder) for folder in folders]
    for parent in parents:
        if not os.access(parent, os.W_OK):
            text, fix = _("{folder} can't be written"), "sudo chown -R $USER {folder}"
            return failure("disk.read_only", text, fix, folder=str(parent))
    free, home = shutil.disk_usage(parents[0]).free, Path.home()
    names = [f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
             for folder in folders]  # fmt: skip
    values: dict[str, Any] = {"free": free / 10**9, "folders": ", ".join(names)}
    enough = _("{free:.1f} GB free for {folders}")
    if free >= _DISK_LOW:
        return ok("disk.enough", enough, **values)
    fix = _("Free some space, or use another disk: `--set output_dir=FOLDER` for runs, "
            "JETSON_FT_CACHE and HF_HOME for the rest.")  # fmt: skip
    if free < _DISK:
        return failure("disk.full", enough, fix, **values)
    text = _("{free:.1f} GB free for {folders}: enough for the embedded model only")
    return warning("disk.low", text, fix, **values)


def _sensors(machine: Machine) -> Iterator[Finding]:
    reading = _first_reading(machine)
    source = reading.source
    values = {"W": reading.watts, "°C": reading.temperature, "% GPU": reading.gpu_load}
    known = [f"{value:.0f} {unit}" for unit, value in values.items() if value is not None]
    if known:
        yield ok("sensors.read", _("{source}: {values}"), source=source, values=", ".join(known))
    elif machine.board:
        text = _("power and temperature can't be read; reports will have no energy")
        fix = _("In a container: `docker run -v /usr/bin/tegrastats:/usr/bin/tegrastats:ro …`")
        yield warning("sensors.none", text, fix)
    else:
        text = _("memory only ({source}); power and temperature can't be measured here")
        yield ok("sensors.memory_only", text, source=source)
    if (machine.root / "run/jtop.sock").exists() and source != "jtop":
        version = detect.package_version("jetson-stats") or "–"
        text = _("its service doesn't answer jetson-stats {version}; {source} is used instead")
        fix = _("The service and .venv need the same version (`jtop --version`): "
                "`.venv/bin/pip install jetson-stats==VERSION`")  # fmt: skip
        yield warning("jtop.no_answer", text, fix, version=version, source=source)


def _first_reading(machine: Machine) -> Reading:
    """Return the first reading with power or temperature; without them, one after a while."""
    deadline = time.monotonic() + _SENSOR_SECONDS
    with contextlib.closing(Telemetry(machine.root, machine.path)) as telemetry:
        while True:
            reading = telemetry.read()
            complete = reading.temperature is not None or reading.watts is not None
            if complete or reading.source == "psutil" or time.monotonic() > deadline:
                return reading
            time.sleep(0.05)


def _hub() -> Finding:
    if hub.is_offline():
        text = _("HF_HUB_OFFLINE is set; the embedded model, local and downloaded files work")
        return warning("hub.offline", text, "unset HF_HUB_OFFLINE")
    address = hub.endpoint()
    if hub.reachable():
        return ok("hub.reachable", _("{address} answers"), address=address)
    text = _("{address} doesn't answer; the embedded model, local and downloaded files work")
    fix = _("Use a mirror: `export HF_ENDPOINT=https://…`")
    return warning("hub.unreachable", text, fix, address=address)
