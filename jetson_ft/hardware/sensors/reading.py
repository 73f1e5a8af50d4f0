"""One reading of a machine's sensors, the same for every source."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field

# Rails whose sum is the total, by preference; an AGX Orin has no rail for the total.
_TOTALS = (
    ("VIN",), ("VDD_IN",), ("POM_5V_IN",), ("GPU",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
)  # fmt: skip
# A sensor that is off reads -256; other values outside this range are errors too.
_LOWEST, _HIGHEST = -60.0, 200.0
THROTTLES_AT = 99.0  # where the firmware of an Orin lowers the clocks; at 104.5 it shuts down


@dataclass(frozen=True)
class Reading:
    """Sensor values of one moment, in bytes, watts and degrees Celsius.

    A value that no sensor measures is None, or missing from its mapping.
    """

    source: str
    gpu_load: float | None = None  # percent
    gpu_mhz: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    rails: Mapping[str, float] = field(default_factory=dict)
    over_current: Mapping[str, int] = field(default_factory=dict)  # events since boot
    alerts: tuple[str, ...] = ()  # units whose clocks the firmware has lowered

    @property
    def watts(self) -> float | None:
        """Power of the board; with a discrete GPU, power of that GPU."""
        for names in _TOTALS:
            if all(name in self.rails for name in names):
                return sum(self.rails[name] for name in names)
        return None

    @property
    def temperature(self) -> float | None:
        """Temperature of the junction, which decides about throttling, or of the hottest sensor."""
        return self.temperatures.get("tj", max(self.temperatures.values(), default=None))

    @property
    def throttled(self) -> bool:
        """Whether the clocks are lowered because of heat."""
        return bool(self.alerts) or self.temperatures.get("tj", 0.0) >= THROTTLES_AT


Readings = Generator[Reading, None, None]  # of one source; closed, it releases what it started


def temperatures(sensors: Mapping[str, float]) -> dict[str, float]:
    """Return degrees by short sensor name, without the sensors that are off.

    `tj-thermal`, `Tj_thermal` and `tj` are the same sensor.
    """
    named = {}
    for sensor, value in sensors.items():
        name = sensor.strip().lower()
        for suffix in ("-thermal", "_thermal", "-therm"):
            name = name.removesuffix(suffix)
        # The PMIC of older modules reads 100 at any temperature.
        if _LOWEST < value < _HIGHEST and name != "pmic":
            named[name] = value
    return named


def rails(milliwatts: Mapping[str, float]) -> dict[str, float]:
    """Return watts by rail. NC is a pin that isn't connected."""
    return {name.upper(): value / 1000 for name, value in milliwatts.items() if name != "NC"}
