"""Energy, events and temperature from fake sensors."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import LAPTOP, NANO, FakeMachine
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.events import Event, Sensors
from jetson_ft.hardware import monitor
from jetson_ft.hardware.monitor import EnergyMeter, Monitor, SampleAggregator
from jetson_ft.hardware.sensors.reading import Reading
from jetson_ft.hardware.sensors.source import Telemetry

# --- energy ----------------------------------------------------------------------------------


def test_energy_is_the_integral_of_power() -> None:
    meter = EnergyMeter()
    meter.sample(-1.0, 10.0)
    meter.start(0.0)
    meter.sample(1.0, 20.0)  # 15 J
    meter.sample(3.0, 10.0)  # 30 J
    assert meter.stop(4.0) == pytest.approx(55.0)  # and 10 J at the last power


def test_stopped_meter_counts_nothing() -> None:
    meter = EnergyMeter()
    meter.sample(0.0, 5.0)
    meter.start(0.0)
    assert meter.stop(2.0) == pytest.approx(10.0)
    meter.sample(50.0, 1000.0)
    meter.sample(60.0, 5.0)
    meter.start(60.0)
    assert meter.stop(61.0) == pytest.approx(5.0)


def test_unknown_power_gives_no_energy() -> None:
    meter = EnergyMeter()
    meter.start(0.0)
    assert meter.stop(1.0) is None
    meter.start(1.0)
    meter.sample(1.5, 10.0)
    assert meter.stop(2.0) is None, "half of it wasn't known"


def test_old_sample_gives_no_energy() -> None:
    meter = EnergyMeter()
    meter.sample(0.0, 10.0)
    meter.start(0.0)
    assert meter.stop(29.0) == pytest.approx(290.0)
    meter.start(29.0)
    assert meter.stop(31.0) is None


@given(st.lists(st.tuples(st.floats(0.01, 9.0), st.floats(0, 60)), min_size=1, max_size=20))
def test_energies_of_consecutive_steps_add_up(steps: list[tuple[float, float]]) -> None:
    whole, parts = EnergyMeter(), EnergyMeter()
    for meter in (whole, parts):
        meter.sample(0.0, 7.0)
        meter.start(0.0)
    now, total = 0.0, 0.0
    for seconds, watts in steps:
        now += seconds
        for meter in (whole, parts):
            meter.sample(now, watts)
        total += parts.stop(now) or 0.0
        parts.start(now)
    assert math.isclose(total, whole.stop(now) or 0.0, rel_tol=1e-9, abs_tol=1e-9)


# --- aggregation -------------------------------------------------------------------------------


def reading(watts: float | None = None, tj: float = 50.0, **others: Any) -> Reading:
    rails = {} if watts is None else {"VDD_IN": watts}
    return Reading("test", temperatures={"tj": tj}, rails=rails, **others)


def take_event(samples: SampleAggregator) -> Sensors:
    event = samples.take_event(1)
    assert event
    return event


def test_event_has_means_and_highest_temperature_since_the_last_event() -> None:
    samples = SampleAggregator()
    samples.add(0.0, reading(10.0, 60.0, gpu_load=80.0))
    samples.add(2.0, reading(20.0, 50.0, gpu_load=100.0))
    event = take_event(samples)
    assert (event.watts, event.temperature, event.gpu_load) == (15, 60, 90)
    samples.add(4.0, reading(None, 40.0))
    event = take_event(samples)
    assert (event.watts, event.temperature) == (None, 40)
    assert samples.take_event(1) is None


def test_counts_and_throttled_seconds_are_since_the_start() -> None:
    samples = SampleAggregator()
    samples.add(0.0, reading(over_current={"oc1": 5, "oc3": 100}, alerts=("gpu",)))
    assert take_event(samples).throttled_seconds == 0.0
    samples.add(2.0, reading(over_current={"oc1": 5, "oc3": 140}, alerts=("gpu",)))
    samples.add(4.0, reading(over_current={"oc1": 5, "oc3": 140}))
    event = take_event(samples)
    assert event.over_current == {"oc1": 0, "oc3": 40} and event.throttled_seconds == 2.0


# --- the thread --------------------------------------------------------------------------------


class EventList(list[Sensors]):
    def emit(self, event: Event) -> None:
        assert isinstance(event, Sensors)
        self.append(event)

    def wait(self, count: int = 1) -> None:
        deadline = time.monotonic() + 5
        while len(self) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self) >= count


def test_monitor_emits_and_measures_until_it_is_stopped(tmp_path: Path) -> None:
    board, events = FakeMachine(tmp_path, NANO), EventList()
    telemetry = Telemetry(tmp_path, path="")
    with Monitor(telemetry, events.emit, interval=0.02, event_interval=0.05) as sensors:
        sensors.step = 7
        events.wait(2)
        board.heat({"cpu": 70.0, "gpu": 80.0, "tj": 91.0})
        events.wait(len(events) + 2)
        assert sensors.temperature == 91.0
        sensors.meter.start(time.monotonic())
        time.sleep(0.05)
        assert sensors.meter.stop(time.monotonic()) == pytest.approx(12.02 * 0.05, rel=0.5)
    count = len(events)
    time.sleep(0.1)
    assert len(events) == count
    last = events[-1]
    assert (last.step, last.temperature, last.gpu_load) == (7, 91.0, 97.0)
    assert last.watts == pytest.approx(12.02, rel=1e-3)


def test_short_run_emits_one_event_at_the_end(tmp_path: Path) -> None:
    FakeMachine(tmp_path, NANO)
    events = EventList()
    telemetry = Telemetry(tmp_path, path="")
    with Monitor(telemetry, events.emit, interval=0.01, event_interval=60.0):
        time.sleep(0.2)
    assert len(events) == 1
    assert monitor.EVENT_INTERVAL >= 5


def test_machine_without_power_sensor_emits_memory(tmp_path: Path) -> None:
    FakeMachine(tmp_path, LAPTOP)
    events = EventList()
    telemetry = Telemetry(tmp_path, path="")
    with Monitor(telemetry, events.emit, interval=0.01, event_interval=0.01) as sensors:
        events.wait(2)
        sensors.meter.start(time.monotonic())
        assert sensors.meter.stop(time.monotonic()) is None
    assert events[0].watts is None and (events[0].memory_used or 0) > 0


def test_slow_first_reading_is_waited_for(tmp_path: Path) -> None:
    """tegrastats needs two seconds; the energy of the steps before would be unknown."""
    board = FakeMachine(tmp_path, NANO)
    path = board.program("tegrastats", f"sleep 0.7\necho '{NANO.line}'\nexec sleep 60")
    telemetry = Telemetry(tmp_path, path=f"{path}{os.pathsep}{os.environ['PATH']}")
    with Monitor(telemetry) as sensors:
        sensors.wait_for_reading()
        sensors.meter.start(time.monotonic())
        assert sensors.meter.stop(time.monotonic()) is not None


def test_missing_first_reading_is_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_FIRST_READING_SECONDS", 0.2)
    path = FakeMachine(tmp_path, NANO).program("tegrastats", "exec sleep 60")
    telemetry = Telemetry(tmp_path, path=f"{path}{os.pathsep}{os.environ['PATH']}")
    with Monitor(telemetry, interval=0.01) as sensors:
        sensors.wait_for_reading()
        sensors.meter.start(time.monotonic())
        assert sensors.meter.stop(time.monotonic()) is None


def test_monitor_without_telemetry_starts_no_thread() -> None:
    before = threading.active_count()
    with Monitor() as sensors:
        assert threading.active_count() == before
        assert sensors.temperature is None and not sensors.is_active


def test_failing_emit_ends_the_thread_only(tmp_path: Path) -> None:
    FakeMachine(tmp_path, NANO)
    called = threading.Event()

    def emit(event: Event) -> None:
        called.set()
        raise OSError("the disk is full")

    with Monitor(Telemetry(tmp_path, path=""), emit, interval=0.01, event_interval=0.01):
        assert called.wait(5)
