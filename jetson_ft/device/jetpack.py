"""What a Jetson's system software says about itself: L4T, JetPack, power modes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# L4T -> JetPack, as NVIDIA published them together; others go by their first number.
_JETPACKS = {
    "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4",
    "36.2.0": "6.0 DP", "36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1",
    "36.4.7": "6.2.1", "36.5.0": "6.2.2", "38.2.0": "7.0", "38.4.0": "7.1", "39.2.0": "7.2",
}  # fmt: skip
_SERIES = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}


@dataclass(frozen=True, order=True)
class L4T:
    """NVIDIA's Linux for Jetson: R36 (release), REVISION: 4.3 is 36.4.3."""

    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.numbers))

    @property
    def jetpack(self) -> str:
        """The JetPack it came with; empty: unknown."""
        known = _JETPACKS.get(str(self))
        return known or (f"{self.major}" if self.major else "")

    @property
    def major(self) -> int:
        """JetPack's first number; 0: unknown."""
        return _SERIES.get(self.numbers[0], 0)


def l4t(root: Path = Path("/")) -> L4T | None:
    """What /etc/nv_tegra_release says; None where there is none."""
    try:
        text = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return None
    found = re.search(
        r"\bR(\d{1,4}) \(release\), REVISION: (\d{1,4}(?:\.\d{1,4})*)", text, re.ASCII
    )
    return L4T((int(found[1]), *map(int, found[2].split(".")))) if found else None


@dataclass(frozen=True)
class PowerModes:
    """nvpmodel's modes by number, and the one that is set."""

    names: dict[int, str]
    current: int

    @property
    def fastest(self) -> int:
        """MAXN in one of its forms, else the mode with the most watts."""
        return max(self.names, key=lambda number: (_rank(self.names[number]), -number))


def _rank(name: str) -> tuple[int, int]:
    watts = re.match(r"(\d{1,4})W", name, re.ASCII)
    maxn = ("MAXN_SUPER", "MAXN").index(name) if name in ("MAXN_SUPER", "MAXN") else 2
    return (2 - maxn, int(watts[1]) if watts else 0)


def power_modes(root: Path = Path("/")) -> PowerModes | None:
    """From nvpmodel's own files, which need no rights; None where they can't be read."""
    try:
        status = (root / "var/lib/nvpmodel/status").read_text(errors="ignore")
        config = (root / "etc/nvpmodel.conf").read_text(errors="ignore")
    except OSError:
        return None
    current = re.search(r"pmode:(\d{1,4})", status, re.ASCII)
    pattern = r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([^\s>]+)\s*>"
    names = {int(number): name for number, name in re.findall(pattern, config, re.ASCII)}
    if current is None or int(current[1]) not in names:
        return None
    return PowerModes(names, int(current[1]))
