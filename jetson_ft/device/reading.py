"""What one look at a machine's sensors tells, the same from every source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Rails that carry everything, by preference; without one of them, the three of an AGX Orin.
_WHOLE = ("VIN", "VDD_IN", "POM_5V_IN", "GPU")
_AGX = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
# A sensor that is switched off says -256; whatever else is beyond these is no temperature either.
_COLDEST, _HOTTEST = -60.0, 200.0
# From here on the firmware lowers the clocks of an Orin (and ends it at 104.5).
THROTTLES_AT = 99.0


@dataclass(frozen=True)
class Reading:
    """Figures of one moment; what no sensor tells is None or missing. Bytes, watts, Celsius."""

    source: str
    gpu_load: float | None = None  # percent
    gpu_mhz: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    rails: Mapping[str, float] = field(default_factory=dict)
    over_current: Mapping[str, int] = field(default_factory=dict)  # events since the machine began
    alerts: tuple[str, ...] = ()  # of clocks lowered by the firmware

    @property
    def watts(self) -> float | None:
        """What the board draws (a GPU of its own: what that draws)."""
        for name in _WHOLE:
            if name in self.rails:
                return self.rails[name]
        if all(name in self.rails for name in _AGX):
            return sum(self.rails[name] for name in _AGX)
        return None

    @property
    def temperature(self) -> float | None:
        """Of the junction, which decides about throttling; without it, of the hottest sensor."""
        if "tj" in self.temperatures:
            return self.temperatures["tj"]
        return max(self.temperatures.values(), default=None)

    @property
    def throttled(self) -> bool:
        """Whether the clocks are lowered because of heat."""
        return bool(self.alerts) or (self.temperatures.get("tj") or 0.0) >= THROTTLES_AT


def temperatures(found: Mapping[str, float]) -> dict[str, float]:
    """By short, small names, without the sensors that are off."""
    named = {short(name): value for name, value in found.items()}
    # The PMIC of older modules says 100 whatever happens.
    return {n: v for n, v in named.items() if _COLDEST < v < _HOTTEST and n != "pmic"}


def short(name: str) -> str:
    """`tj-thermal`, `Tj_thermal` and `tj` are one sensor."""
    lower = name.strip().lower()
    for end in ("-thermal", "_thermal", "-therm"):
        lower = lower.removesuffix(end)
    return lower


def rails(milliwatts: Mapping[str, float]) -> dict[str, float]:
    """Watts by rail; NC is a pin that isn't connected."""
    return {name.upper(): value / 1000 for name, value in milliwatts.items() if name != "NC"}
