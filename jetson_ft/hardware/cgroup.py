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

    limit: str
    usage: str
    inactive: str  # page cache that the kernel frees first


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """Return the limit that leaves the least memory.

    The driver's memory of a Jetson's GPU (NvMap) may not count in a group's usage.
    """
    limits = []
    for folder, files in _groups(root):
        limit = parse_size(read_text(folder / files.limit))
        usage = parse_size(read_text(folder / files.usage))
        if limit is None or usage is None:
            continue
        stat = read_text(folder / "memory.stat")
        match = re.search(rf"^{files.inactive} (\d+)$", stat, re.ASCII | re.MULTILINE)
        inactive = (parse_size(match[1]) if match else None) or 0
        used = max(0, usage - inactive)
        limits.append(MemoryLimit(limit, max(0, limit - used)))
    return min(limits, key=lambda limit: limit.available, default=UNLIMITED)


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
