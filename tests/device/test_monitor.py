"""Energy, events and heat, from sensors that say what they are told."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import LAPTOP, NANO, Folder
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.device import monitor
from jetson_ft.device.meter import Meter
from jetson_ft.device.monitor import Account, Monitor
from jetson_ft.device.reading import Reading
from jetson_ft.device.telemetry import Telemetry

# --- energy ----------------------------------------------------------------------------------


def test_energy_is_the_powers_integral() -> None:
    meter = Meter()
    meter.sample(-1.0, 10.0)
    meter.start(0.0)
    meter.sample(1.0, 20.0)  # 15 J
    meter.sample(3.0, 10.0)  # 30 J
    assert meter.stop(4.0) == pytest.approx(55.0)  # and 10 J at what was drawn last


def test_nothing_is_counted_between_stop_and_start() -> None:
    meter = Meter()
    meter.sample(0.0, 5.0)
    meter.start(0.0)
    assert meter.stop(2.0) == pytest.approx(10.0)
    meter.sample(50.0, 1000.0)
    meter.sample(60.0, 5.0)
    meter.start(60.0)
    assert meter.stop(61.0) == pytest.approx(5.0)


def test_without_power_there_is_no_energy() -> None:
    meter = Meter()
    meter.start(0.0)
    assert meter.stop(1.0) is None
    meter.start(1.0)
    meter.sample(1.5, 10.0)
    assert meter.stop(2.0) is None, "half of it wasn't known"


def test_power_that_is_told_no_more_isnt_known_for_ever() -> None:
    meter = Meter()
    meter.sample(0.0, 10.0)
    meter.start(0.0)
    assert meter.stop(29.0) == pytest.approx(290.0)
    meter.start(29.0)
    assert meter.stop(31.0) is None


@given(st.lists(st.tuples(st.floats(0.01, 9.0), st.floats(0, 60)), min_size=1, max_size=20))
def test_steps_that_follow_each_other_add_up(steps: list[tuple[float, float]]) -> None:
    """Cut into pieces at its samples, the integral is the same."""
    whole, pieces = Meter(), Meter()
    for meter in (whole, pieces):
        meter.sample(0.0, 7.0)
        meter.start(0.0)
    now, total = 0.0, 0.0
    for seconds, watts in steps:
        now += seconds
        for meter in (whole, pieces):
            meter.sample(now, watts)
        total += pieces.stop(now) or 0.0
        pieces.start(now)
    assert math.isclose(total, whole.stop(now) or 0.0, rel_tol=1e-9, abs_tol=1e-9)


# --- what is told ------------------------------------------------------------------------------


def reading(watts: float | None = None, tj: float = 50.0, **others: Any) -> Reading:
    rails = {} if watts is None else {"VDD_IN": watts}
    return Reading("test", temperatures={"tj": tj}, rails=rails, **others)


def test_an_event_tells_means_and_the_highest_temperature_since_the_last_one() -> None:
    account = Account()
    account.add(0.0, reading(10.0, 60.0, gpu_load=80.0))
    account.add(2.0, reading(20.0, 50.0, gpu_load=100.0))
    told = account.fields()
    assert (told["watts"], told["temperature"], told["gpu_load"]) == (15, 60, 90)
    account.add(4.0, reading(None, 40.0))
    told = account.fields()
    assert (told["watts"], told["temperature"]) == (None, 40)
    assert account.fields() == {}


def test_counts_and_throttling_are_since_the_start() -> None:
    account = Account()
    account.add(0.0, reading(over_current={"oc1": 5, "oc3": 100}, alerts=("gpu",)))
    assert account.fields()["throttled_seconds"] == 0.0
    account.add(2.0, reading(over_current={"oc1": 5, "oc3": 140}, alerts=("gpu",)))
    account.add(4.0, reading(over_current={"oc1": 5, "oc3": 140}))
    told = account.fields()
    assert told["over_current"] == {"oc1": 0, "oc3": 40} and told["throttled_seconds"] == 2.0


# --- the thread --------------------------------------------------------------------------------


class Heard(list[dict[str, Any]]):
    """Events, as a run's log takes them."""

    def emit(self, kind: str, **fields: Any) -> None:
        assert kind == "sample"
        self.append(fields)

    def wait(self, count: int = 1) -> None:
        deadline = time.monotonic() + 5
        while len(self) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self) >= count


def test_a_board_is_watched_as_long_as_it_is_asked_for(tmp_path: Path) -> None:
    board, heard = Folder(tmp_path, NANO), Heard()
    with Monitor(Telemetry(tmp_path, path=""), heard.emit, every=0.02, told_every=0.05) as found:
        found.step = 7
        heard.wait(2)
        board.heat({"cpu": 70.0, "gpu": 80.0, "tj": 91.0})
        heard.wait(len(heard) + 2)
        assert found.temperature == 91.0
        found.meter.start(time.monotonic())
        time.sleep(0.05)
        assert found.meter.stop(time.monotonic()) == pytest.approx(12.02 * 0.05, rel=0.5)
    count = len(heard)
    time.sleep(0.1)
    assert len(heard) == count
    last = heard[-1]
    assert (last["step"], last["temperature"], last["gpu_load"]) == (7, 91.0, 97.0)
    assert last["watts"] == pytest.approx(12.02, rel=1e-3)


def test_events_are_few_and_the_last_one_is_told_at_the_end(tmp_path: Path) -> None:
    Folder(tmp_path, NANO)
    heard = Heard()
    with Monitor(Telemetry(tmp_path, path=""), heard.emit, every=0.01, told_every=60.0):
        time.sleep(0.2)
    assert len(heard) == 1
    assert monitor._TOLD_EVERY >= 5


def test_where_nothing_measures_power_memory_is_told_all_the_same(tmp_path: Path) -> None:
    Folder(tmp_path, LAPTOP)
    heard = Heard()
    with Monitor(Telemetry(tmp_path, path=""), heard.emit, every=0.01, told_every=0.01) as found:
        heard.wait(2)
        found.meter.start(time.monotonic())
        assert found.meter.stop(time.monotonic()) is None
    assert "watts" not in heard[0] and heard[0]["memory_used"] > 0


def test_a_sources_first_word_is_waited_for(tmp_path: Path) -> None:
    """tegrastats says it after two seconds; the energy of the steps before would be missing."""
    board = Folder(tmp_path, NANO)
    path = board.program("tegrastats", f"sleep 0.7\necho '{NANO.line}'\nexec sleep 60")
    source = Telemetry(tmp_path, path=f"{path}{os.pathsep}{os.environ['PATH']}")
    with Monitor(source, Heard().emit) as found:
        found.wait_for_first()
        found.meter.start(time.monotonic())
        assert found.meter.stop(time.monotonic()) is not None


def test_a_source_that_says_nothing_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_PATIENCE", 0.2)
    path = Folder(tmp_path, NANO).program("tegrastats", "exec sleep 60")
    source = Telemetry(tmp_path, path=f"{path}{os.pathsep}{os.environ['PATH']}")
    with Monitor(source, Heard().emit, every=0.01) as found:
        found.wait_for_first()
        found.meter.start(time.monotonic())
        assert found.meter.stop(time.monotonic()) is None


def test_one_that_watches_nothing_starts_nothing() -> None:
    before = threading.active_count()
    with Monitor() as found:
        assert threading.active_count() == before
        assert found.temperature is None and not found.watches


def test_a_log_that_can_be_written_no_more_ends_the_watch_alone(tmp_path: Path) -> None:
    Folder(tmp_path, NANO)
    asked = threading.Event()

    def emit(kind: str, **fields: Any) -> None:
        asked.set()
        raise OSError("the disk is full")

    with Monitor(Telemetry(tmp_path, path=""), emit, every=0.01, told_every=0.01):
        assert asked.wait(5)
