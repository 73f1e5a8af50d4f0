"""Energy out of samples of power."""

from __future__ import annotations

import threading

STALE_SECONDS = 30.0  # after which the power isn't known any more


class Meter:
    """Joules between `start` and `stop`: the power's integral by the trapezoidal rule.

    Samples come from another thread, and go on in between: what was drawn at `start` and at
    `stop` is taken to be the sample before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[float, float] | None = None  # time and watts of the newest sample
        self._since: float | None = None  # end of what is counted already; None: stopped
        self._joules: float | None = 0.0  # None: the power wasn't known all the time

    def sample(self, now: float, watts: float) -> None:
        """The power at a time, in seconds of any one clock."""
        with self._lock:
            self._count(now, watts)
            self._last = (now, watts)

    def start(self, now: float) -> None:
        """Counts from here on, from zero."""
        with self._lock:
            self._since, self._joules = now, 0.0

    def stop(self, now: float) -> float | None:
        """Joules since `start`; None if the power wasn't known all the time."""
        with self._lock:
            self._count(now, self._last[1] if self._last else 0.0)
            self._since = None
            return self._joules

    def _count(self, now: float, watts: float) -> None:
        """What was drawn since it was last counted, when `watts` are drawn now."""
        if self._since is None:
            return
        if self._last is None or now - self._last[0] > STALE_SECONDS:
            self._joules = None
        elif self._joules is not None:
            self._joules += (now - self._since) * (self._last[1] + watts) / 2
        self._since = now
