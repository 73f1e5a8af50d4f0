"""Spares a board heat: training waits between two steps until it has cooled.

Nothing is learnt differently for it, and the time isn't counted as training.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jetson_ft.device.monitor import Monitor
from jetson_ft.training.group import Group

MARGIN = 5.0  # degrees below the limit where it goes on
_LOOK_SECONDS = 1.0  # between looks while it waits
# Looks in a row that must find it cool, so that two readings of the sensors say so: one may miss
# the sensor that is hot.
_COOL_LOOKS = 3


class Heat:
    """Holds all processes as long as one of their machines is too hot.

    Args:
        limit: degrees Celsius; 0: never.
        emit: receives `pause`, `pause_end` and at most one `warning`.
        stop_requested: asked while waiting, so that a stop is obeyed there too.
    """

    def __init__(
        self,
        limit: float,
        monitor: Monitor,
        group: Group,
        emit: Callable[..., None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.limit, self._monitor, self._group = limit, monitor, group
        self._emit, self._stop_requested = emit, stop_requested
        self._checked = not limit

    def wait(self, step: int) -> bool:
        """Waits if it has to; whether a stop was asked for meanwhile."""
        if not self.limit:
            return False
        self._check_sensor()
        if not self._group.sum([self._above(self.limit)])[0]:
            return False
        started = time.monotonic()
        self._emit("pause", step=step, temperature=self._monitor.temperature, limit=self.limit,
                   until=self.limit - MARGIN)  # fmt: skip
        stop = self._until_cool()
        self._emit("pause_end", step=step, temperature=self._monitor.temperature,
                   seconds=round(time.monotonic() - started, 1))  # fmt: skip
        return stop

    def _until_cool(self) -> bool:
        cool = 0
        while cool < _COOL_LOOKS:
            time.sleep(_LOOK_SECONDS)
            stops, hot = self._group.sum(
                [float(self._stop_requested()), self._above(self.limit - MARGIN)]
            )
            if stops:
                return True
            cool = 0 if hot else cool + 1
        return False

    def _above(self, limit: float) -> float:
        """1 where this machine is known to be at least so hot, else 0."""
        found = self._monitor.temperature
        return float(found is not None and found >= limit)

    def _check_sensor(self) -> None:
        """A limit that nothing can hold is told once."""
        if not self._checked and self._monitor.watches and self._monitor.temperature is None:
            self._emit(
                "warning",
                message=f"device.max_temperature_c is {self.limit:g}, but no sensor of this "
                "machine tells a temperature; training won't pause",
            )
        self._checked = True
