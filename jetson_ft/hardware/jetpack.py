"""The system software of a Jetson: L4T, JetPack, power modes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jetson_ft.hardware.sensors.sysfs import read_text

# JetPack by the L4T that NVIDIA published with it; of others the series gives the first number.
_JETPACKS = {
    "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4",
    "36.2.0": "6.0 DP", "36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1",
    "36.4.7": "6.2.1", "36.5.0": "6.2.2", "38.2.0": "7.0", "38.4.0": "7.1", "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}  # fmt: skip
_SERIES = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}


@dataclass(frozen=True, order=True)
class L4T:
    """Version of NVIDIA's Linux for Tegra."""

    numbers: tuple[int, ...]  # (36, 4, 3)

    def __str__(self) -> str:
        return ".".join(map(str, self.numbers))

    @property
    def jetpack(self) -> str:
        """JetPack version, else its major version; '' if unknown."""
        return _JETPACKS.get(str(self)) or str(self.major or "")

    @property
    def series(self) -> int:
        """The first number: 36 is JetPack 6, 38 JetPack 7.0 and 7.1 (Thor only), 39 JetPack 7.2."""
        return self.numbers[0]

    @property
    def major(self) -> int:
        """JetPack's major version; 0: unknown."""
        return _SERIES.get(self.series, 0)


def read_l4t(root: Path) -> L4T | None:
    """Return the L4T that /etc/nv_tegra_release names; None: unreadable.

    The file names 36.4.3 as `R36 (release), REVISION: 4.3`.
    """
    pattern = r"\bR(\d{1,4}) \(release\), REVISION: (\d{1,4}(?:\.\d{1,4})*)"
    match = re.search(pattern, read_text(root / "etc/nv_tegra_release"), re.ASCII)
    return L4T((int(match[1]), *map(int, match[2].split(".")))) if match else None


@dataclass(frozen=True)
class PowerModes:
    """The modes of nvpmodel by number, and the current one."""

    names: dict[int, str]
    current: int

    @property
    def fastest(self) -> int:
        """Number of MAXN_SUPER, else MAXN, else the mode with the most watts."""

        def rank(number: int) -> tuple[int, int, int]:
            name = self.names[number]
            watts = re.match(r"(\d{1,4})W", name, re.ASCII)
            maxn = {"MAXN_SUPER": 2, "MAXN": 1}.get(name, 0)
            return maxn, int(watts[1]) if watts else 0, -number

        return max(self.names, key=rank)


def read_power_modes(root: Path) -> PowerModes | None:
    """Return the modes from the files of nvpmodel, which need no rights; None: unreadable."""
    pattern = r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([^\s>]+)\s*>"
    modes = re.findall(pattern, read_text(root / "etc/nvpmodel.conf"), re.ASCII)
    names = {int(number): name for number, name in modes}
    status = read_text(root / "var/lib/nvpmodel/status")
    current = re.search(r"pmode:(\d{1,4})", status, re.ASCII)
    if current is None or int(current[1]) not in names:
        return None
    return PowerModes(names, int(current[1]))
