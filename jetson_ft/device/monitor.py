"""Watches a machine's sensors beside a run: events, energy, heat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

from jetson_ft.device.meter import STALE_SECONDS, Meter
from jetson_ft.device.reading import Reading
from jetson_ft.device.telemetry import Telemetry

_EVERY = 2.0  # seconds between looks
_AT_FIRST = [0.25] * 10  # likewise, as a source takes a moment to say its first word
_TOLD_EVERY = 10.0  # seconds between events
_PATIENCE = 3.0  # seconds a source is given for its first word; tegrastats takes two


class Monitor:
    """A thread that reads the sensors every two seconds, and tells every ten.

    Without arguments it watches nothing: for processes beside a machine's first.

    Args:
        telemetry: where the figures come from; closed at the end.
        emit: receives `sample` events.
        every, told_every: seconds.
    """

    def __init__(
        self,
        telemetry: Telemetry | None = None,
        emit: Callable[..., None] = lambda kind, **fields: None,
        every: float = _EVERY,
        told_every: float = _TOLD_EVERY,
    ) -> None:
        self.step = 0  # of the run, for the events
        self.meter = Meter()
        self._telemetry, self._emit = telemetry, emit
        self._every, self._told_every = every, told_every
        self._account = Account()
        self._newest: tuple[float, float | None] = (0.0, None)  # time and temperature
        self._spoken, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="sensors")

    def __enter__(self) -> Monitor:
        if self._telemetry is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Tells what is left to tell, and ends; more than once is once."""
        self._over.set()
        if self._telemetry is not None:
            self._thread.join(5.0)

    def wait_for_first(self) -> None:
        """Until there are figures, for some seconds: with them, no step's energy is missing."""
        if self._telemetry is not None:
            self._spoken.wait(_PATIENCE)

    @property
    def watches(self) -> bool:
        """Whether there is anything to come from it."""
        return self._telemetry is not None

    @property
    def temperature(self) -> float | None:
        """The newest one, as long as it is any good."""
        seen_at, value = self._newest
        return value if time.monotonic() - seen_at < STALE_SECONDS else None

    def _watch(self) -> None:
        assert self._telemetry is not None
        told_at = time.monotonic()
        waits = chain(_AT_FIRST, repeat(self._every))
        try:
            while not self._over.wait(min(next(waits), self._every)):
                self._look(self._telemetry.read())
                if time.monotonic() - told_at > self._told_every - self._every / 2:
                    told_at = time.monotonic()
                    self._tell()
            self._tell()
        except Exception:  # of `emit`, on a full disk: the run itself meets it too, and says so
            return
        finally:
            self._telemetry.close()

    def _look(self, found: Reading) -> None:
        now = time.monotonic()
        self._newest = (now, found.temperature)
        if found.watts is not None:
            self.meter.sample(now, found.watts)
        if found.memory_used is not None or found.watts is not None:
            self._spoken.set()
        self._account.add(now, found)

    def _tell(self) -> None:
        known = {key: value for key, value in self._account.fields().items() if value is not None}
        if known:
            self._emit("sample", step=self.step, **known)


class Account:
    """What there is to tell of many readings."""

    def __init__(self) -> None:
        self._found: list[Reading] = []  # since it was told last
        self._first: Reading | None = None
        self._at = 0.0
        self._throttled = 0.0  # seconds since the start

    def add(self, now: float, found: Reading) -> None:
        """One more reading, at a time in seconds."""
        if self._first is None:
            self._first = found
        elif found.throttled:
            self._throttled += now - self._at
        self._at = now
        self._found.append(found)

    def fields(self) -> dict[str, Any]:
        """Of an event: means, the highest temperature, counts since the start; None: unknown."""
        found, self._found = self._found, []
        if not found or self._first is None:
            return {}
        last, heats = found[-1], [one.temperature for one in found if one.temperature is not None]
        begun = self._first.over_current
        return {
            "source": last.source,
            "watts": _mean([one.watts for one in found]),
            "temperature": max(heats, default=None),
            "gpu_load": _mean([one.gpu_load for one in found]),
            "gpu_mhz": last.gpu_mhz,
            "memory_used": last.memory_used,
            "memory_total": last.memory_total,
            "throttled_seconds": round(self._throttled, 1),
            "over_current": {n: max(0, c - begun.get(n, c)) for n, c in last.over_current.items()},
        }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 2) if known else None
