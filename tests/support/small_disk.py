"""A small disk that can be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted tmpfs; `path` is its folder."""

    def __init__(self, path: Path) -> None:
        self.path, self._filling = path, path / "filling"

    def fill(self, leave: int = 0) -> None:
        """Fill the disk, but for `leave` bytes."""
        free = os.statvfs(self.path)
        size = free.f_bavail * free.f_frsize - leave
        if size > 0:
            with open(self._filling, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def empty(self) -> None:
        """Remove the filling."""
        self._filling.unlink(missing_ok=True)

    def files(self) -> list[str]:
        """Return the names of all files, without the filling."""
        return sorted(p.name for p in self.path.rglob("*") if p.is_file() and p != self._filling)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Return an empty disk of 32 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield SmallDisk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
