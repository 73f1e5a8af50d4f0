"""Load, clock, memory, heat and power of this machine, from the best source it has.

jtop's service where it answers, else tegrastats, else the kernel's files, else nvidia-smi, else
what any machine tells. A source that fails gives way to the next, so that reading never raises.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from jetson_ft.device import streams, sysfs
from jetson_ft.device.jtop_client import Jtop
from jetson_ft.device.reading import Reading, temperatures


class Source(Protocol):
    """Raises whatever it likes; `Telemetry` sees to it."""

    def read(self) -> Reading:
        """The newest figures."""

    def close(self) -> None:
        """Ends what was started for it."""


class Telemetry:
    """One machine's sensors.

    Args:
        root: the folder that stands for `/`.
        path: where programs are looked for; by default as a shell does.
        gpus: how many GPUs of their own are watched, where there are such.
    """

    def __init__(self, root: Path = Path("/"), path: str | None = None, gpus: int = 1) -> None:
        self.root = root
        self._candidates = _candidates(root, path, gpus)
        self._source: Source | None = None

    def read(self) -> Reading:
        """Figures of this moment; of those that can't be had, None."""
        while True:
            try:
                self._source = self._source or next(self._candidates)()
                found = self._source.read()
            except StopIteration:
                return Reading("none")
            except Exception:
                self.close()
                continue
            counts, alerts = sysfs.over_current(self.root), sysfs.alerts(self.root)
            return replace(found, over_current=counts, alerts=alerts)

    def close(self) -> None:
        """Ends the source's own process, if it has one; a later `read` takes the next source."""
        source, self._source = self._source, None
        if source is not None:
            try:
                source.close()
            except Exception:  # it was of no use before
                return


def _candidates(root: Path, path: str | None, gpus: int) -> Iterator[Callable[[], Source]]:
    """Best first."""
    if (root / "run/jtop.sock").exists():
        yield Jtop
    stats = shutil.which("tegrastats", path=path)
    if stats:
        yield lambda: streams.tegrastats(stats)
    if sysfs.has_gpu(root):
        yield lambda: Files(root)
    smi = shutil.which("nvidia-smi", path=path)
    if smi:
        yield lambda: streams.nvidia_smi(smi, gpus)
    yield Anything


class Files:
    """The kernel's files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self) -> Reading:
        """Reads them now."""
        return sysfs.read(self.root)

    def close(self) -> None:
        """Nothing was started."""


class Anything:
    """What Linux tells of any machine."""

    _PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")

    def read(self) -> Reading:
        """Reads it now."""
        import psutil

        memory = psutil.virtual_memory()
        return Reading(
            source="psutil",
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            temperatures=temperatures(self._heat(psutil)),
        )

    def _heat(self, psutil: Any) -> dict[str, float]:
        """Of the processor; disks and network cards have sensors too."""
        found: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
        for name in self._PROCESSORS:
            if found.get(name):
                return {"cpu": max(one.current for one in found[name])}
        return {}

    def close(self) -> None:
        """Nothing was started."""
