"""Pause training between two steps until the board has cooled.

A pause changes nothing in what is trained, and its time isn't counted as training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jetson_ft.errors import Message, _
from jetson_ft.events import Emit, Paused, PauseEnded, Warned
from jetson_ft.hardware.monitor import Monitor
from jetson_ft.training.distributed import DistributedContext

MARGIN = 5.0  # degrees below the limit where training resumes
_POLL_SECONDS = 1.0
# Consecutive polls below the margin, so that two readings of the sensors agree: one reading may
# miss the sensor that is hot.
_COOL_POLLS = 3


@dataclass
class ThermalGuard:
    """Holds all ranks while one of their machines is too hot.

    `limit` is in degrees Celsius; None: never pause.
    """

    limit: float | None
    monitor: Monitor
    dist: DistributedContext
    emit: Emit
    stop_requested: Callable[[], bool]  # polled during a pause too
    _sensor_checked: bool = False

    def wait(self, step: int) -> bool:
        """Pause while the machine is too hot; return whether a stop was requested meanwhile."""
        if self.limit is None:
            return False
        has_sensor = not self.monitor.is_active or self.monitor.temperature is not None
        if not has_sensor and not self._sensor_checked:
            text = _(
                "device.max_temperature_c is {limit:g}, but no sensor of this machine reports a "
                "temperature; training won't pause"
            )
            self.emit(Warned.of_message(Message(text, {"limit": self.limit})))
        self._sensor_checked = True
        if not self.dist.all_reduce_sum([self._is_above(self.limit)])[0]:
            return False
        started, resume_below = time.monotonic(), self.limit - MARGIN
        self.emit(Paused(
            step=step, temperature=self.monitor.temperature, limit=self.limit, until=resume_below
        ))  # fmt: skip
        stopped = self._poll_until_cool(resume_below)
        self.emit(PauseEnded(
            step=step, temperature=self.monitor.temperature,
            seconds=round(time.monotonic() - started, 1),
        ))  # fmt: skip
        return stopped

    def _poll_until_cool(self, resume_below: float) -> bool:
        """Return whether a stop was requested before all machines were cool."""
        cool_polls = 0
        while cool_polls < _COOL_POLLS:
            time.sleep(_POLL_SECONDS)
            stops, hot = self.dist.all_reduce_sum(
                [float(self.stop_requested()), self._is_above(resume_below)]
            )
            if stops:
                return True
            cool_polls = 0 if hot else cool_polls + 1
        return False

    def _is_above(self, limit: float) -> float:
        """Return 1 where this machine is known to be at least so hot, else 0."""
        temperature = self.monitor.temperature
        return float(temperature is not None and temperature >= limit)
