"""Memory limits of control groups, which `docker run -m` and systemd's MemoryMax set.

A limit applies to a group and to all groups below it. So the groups from this process's own up to
the root of the hierarchy are read. Source: the kernel's documents "Control Group v2" and "Memory
Resource Controller" (version 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jetson_ft.hardware.sensors.sysfs import read_text

_MAX_LIMIT = 2**62  # "no limit" in version 1 is 2**63 - 1, rounded down to a page


@dataclass(frozen=True)
class MemoryLimit:
    """The limit of a group, in bytes."""

    limit: int
    available: int  # that the group's processes can still allocate


UNLIMITED = MemoryLimit(_MAX_LIMIT, _MAX_LIMIT)


class _Files(NamedTuple):
    """Names of a group's files, and the key of memory.stat, with all groups below it."""

    limits: tuple[str, ...]
    usage: str
    inactive: str  # page cache that the kernel frees first
    kills: str  # has a line `oom_kill N`


_V1 = _Files(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
)
# Above memory.high a group's processes are slowed down until they hardly move.
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file", "memory.events")


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """Return the limit that leaves the least memory.

    The driver's memory of a Jetson's GPU (NvMap) may not count in a group's usage.
    """
    limits = []
    for folder, files in _groups(root):
        stat = read_text(folder / "memory.stat")
        sizes = [parse_size(read_text(folder / name)) for name in files.limits]
        # Version 1: the lowest limit of this group and those above it, which a container may hide.
        sizes.append(_value(stat, "hierarchical_memory_limit"))
        limit = min((size for size in sizes if size is not None), default=None)
        usage = parse_size(read_text(folder / files.usage))
        if limit is None or usage is None:
            continue
        used = max(0, usage - (_value(stat, files.inactive) or 0))
        limits.append(MemoryLimit(limit, max(0, limit - used)))
    return min(limits, key=lambda limit: limit.available, default=UNLIMITED)


def oom_kills(root: Path = Path("/")) -> int:
    """Return a counter that grows when the kernel kills a process here for lack of memory.

    It is the sum of the groups' counters and the machine's, so one kill may count several times.
    """
    texts = [read_text(folder / files.kills) for folder, files in _groups(root)]
    texts.append(read_text(root / "proc/vmstat"))
    return sum(_value(text, "oom_kill") or 0 for text in texts)


def _value(text: str, key: str) -> int | None:
    """Return the value of a line `key value`; None without one, or out of range."""
    match = re.search(rf"^{key} (\d+)$", text, re.ASCII | re.MULTILINE)
    return parse_size(match[1]) if match else None


def parse_size(text: str) -> int | None:
    """Return the bytes that a file of a group has; None for `max` and other values out of range."""
    size = int(text) if re.fullmatch(r"[0-9]{1,20}", text) else _MAX_LIMIT
    return size if size < _MAX_LIMIT else None


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folders of this process's group and of those above it, which may not exist.

    /proc/self/cgroup has a line such as `4:memory:/docker/1f2e` (version 1) or `0::/docker/1f2e`
    (version 2). In a container the path may be that of the host, while the hierarchy is mounted
    from the container's group on; then only its root exists.
    """
    base = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        controllers, _, name = line.partition(":")[2].partition(":")
        if not controllers:
            mounts, files = [base, base / "unified"], _V2
        elif "memory" in controllers.split(","):
            mounts, files = [base / "memory"], _V1
        else:
            continue
        names = [part for part in name.split("/") if part]
        if ".." in names:  # a group outside this container's hierarchy
            names = []
        for mount in mounts:
            for depth in range(len(names), -1, -1):
                yield mount.joinpath(*names[:depth]), files
