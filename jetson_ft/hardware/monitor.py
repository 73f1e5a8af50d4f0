"""Sensors during a run: events, energy, temperature."""

from __future__ import annotations

import threading
import time
from itertools import chain, repeat

from jetson_ft.events import Emit, Sensors
from jetson_ft.hardware.sensors.reading import Reading
from jetson_ft.hardware.sensors.source import Telemetry

EVENT_INTERVAL = 10.0  # seconds
STALE_SECONDS = 30.0  # after which the last sample of a sensor doesn't count any more
_FIRST_INTERVALS = [0.25] * 10  # shorter at the start, because a source needs a moment
_FIRST_READING_SECONDS = 3.0  # that a source may need for its first reading; tegrastats needs two


class Monitor:
    """A thread that reads the sensors every two seconds and emits an event every ten.

    Args:
        telemetry: the sensors, closed at the end; None: do nothing, for all processes of a machine
            except one.
        interval, event_interval: seconds.
    """

    def __init__(
        self,
        telemetry: Telemetry | None = None,
        emit: Emit = lambda event: None,
        interval: float = 2.0,
        event_interval: float = EVENT_INTERVAL,
    ) -> None:
        self.step = 0  # steps made, for the events
        self.meter = EnergyMeter()
        self.is_active = telemetry is not None
        self._telemetry, self._emit = telemetry, emit
        self._interval, self._event_interval = interval, event_interval
        self._temperature: tuple[float, float | None] = (0.0, None)  # time and value
        self._has_reading, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sensors")

    def __enter__(self) -> Monitor:
        if self.is_active:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Emit the last event and end the thread; further calls do nothing."""
        self._stopped.set()
        if self.is_active:
            self._thread.join(5.0)

    def wait_for_reading(self) -> None:
        """Wait some seconds for the first reading, so that the first steps' energy is known."""
        if self.is_active:
            self._has_reading.wait(_FIRST_READING_SECONDS)

    @property
    def temperature(self) -> float | None:
        """The newest temperature; None: unknown, or too old."""
        read_at, value = self._temperature
        return value if time.monotonic() - read_at < STALE_SECONDS else None

    def _run(self) -> None:
        assert self._telemetry is not None
        samples, emitted_at = SampleAggregator(), time.monotonic()
        intervals = chain(_FIRST_INTERVALS, repeat(self._interval))
        try:
            while not self._stopped.wait(min(next(intervals), self._interval)):
                reading, now = self._telemetry.read(), time.monotonic()
                samples.add(now, reading)
                self._temperature = (now, reading.temperature)
                if reading.watts is not None:
                    self.meter.sample(now, reading.watts)
                if reading.memory_used is not None or reading.watts is not None:
                    self._has_reading.set()
                if now - emitted_at > self._event_interval - self._interval / 2:
                    emitted_at = now
                    if event := samples.take_event(self.step):
                        self._emit(event)
            if event := samples.take_event(self.step):
                self._emit(event)
        except Exception:  # `emit` fails when the disk is full; the run meets and reports that too
            return
        finally:
            self._telemetry.close()


class EnergyMeter:
    """Joules between `start` and `stop`, by the trapezoidal rule.

    Samples come from another thread, also while the meter is stopped: the power at `start` and at
    `stop` is that of the sample before. Times are seconds, all from one monotonic clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[float, float] | None = None  # time and watts of the newest sample
        self._integrated_to: float | None = None  # None: stopped
        self._joules: float | None = 0.0  # None: the power was unknown for a while

    def sample(self, now: float, watts: float) -> None:
        """Add a sample of the power."""
        with self._lock:
            self._integrate(now, watts)
            self._last = (now, watts)

    def start(self, now: float) -> None:
        """Start to count from zero."""
        with self._lock:
            self._integrated_to, self._joules = now, 0.0

    def stop(self, now: float) -> float | None:
        """Return the joules since `start`; None: the power was unknown for a while."""
        with self._lock:
            self._integrate(now, self._last[1] if self._last else 0.0)
            self._integrated_to = None
            return self._joules

    def _integrate(self, now: float, watts: float) -> None:
        """Add the energy since the last call; `watts` is the power at `now`."""
        if self._integrated_to is None:
            return
        if self._last is None or now - self._last[0] > STALE_SECONDS:
            self._joules = None
        elif self._joules is not None:
            self._joules += (now - self._integrated_to) * (self._last[1] + watts) / 2
        self._integrated_to = now


class SampleAggregator:
    """Readings collected for the next event."""

    def __init__(self) -> None:
        self._readings: list[Reading] = []  # since the last event
        self._first: Reading | None = None
        self._last_at = 0.0
        self._throttled_seconds = 0.0  # since the start

    def add(self, now: float, reading: Reading) -> None:
        """Add a reading; `now` in seconds."""
        if self._first is None:
            self._first = reading
        elif reading.throttled:
            self._throttled_seconds += now - self._last_at
        self._last_at = now
        self._readings.append(reading)

    def take_event(self, step: int) -> Sensors | None:
        """Return the event of the readings since the last one; None: there are none."""
        readings, self._readings = self._readings, []
        if not readings or self._first is None:
            return None
        last, initial = readings[-1], self._first.over_current
        temperatures = [r.temperature for r in readings if r.temperature is not None]
        return Sensors(
            step=step,
            source=last.source,
            watts=_mean([reading.watts for reading in readings]),
            temperature=max(temperatures, default=None),
            gpu_load=_mean([reading.gpu_load for reading in readings]),
            gpu_mhz=last.gpu_mhz,
            memory_used=last.memory_used,
            memory_total=last.memory_total,
            throttled_seconds=round(self._throttled_seconds, 1),
            over_current={
                name: max(0, count - initial.get(name, count))
                for name, count in last.over_current.items()
            },
        )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 2) if known else None
