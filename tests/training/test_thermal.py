"""A board that is too hot is waited for, between steps, and nothing else changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import LAPTOP, NANO, FakeMachine

from jetson_ft.hardware.monitor import Monitor
from jetson_ft.hardware.sensors.source import Telemetry
from jetson_ft.training import checkpoint, thermal
from jetson_ft.training.distributed import DistributedContext
from jetson_ft.training.thermal import ThermalGuard


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.setattr(thermal, "_POLL_SECONDS", 0.02)
    made = FakeMachine(tmp_path / "board", NANO)
    set_heat(made, 60.0)
    return made


def set_heat(board: FakeMachine, tj: float) -> None:
    board.heat({"cpu": 50.0, "gpu": 50.0, "tj": tj})


@pytest.fixture
def sensors(board: FakeMachine) -> Iterator[Monitor]:
    with Monitor(Telemetry(board.root, path=""), interval=0.02) as monitor:
        wait_for(lambda: monitor.temperature == 60.0)
        yield monitor


def make_guard(
    sensors: Monitor, dist: DistributedContext | None = None
) -> tuple[ThermalGuard, list[str]]:
    """Return a guard with a limit of 85 degrees, and the kinds of the events that it emits."""
    kinds: list[str] = []
    guard = ThermalGuard(
        85.0,
        sensors,
        dist or DistributedContext(),
        lambda event: kinds.append(event.kind),
        lambda: False,
    )
    return guard, kinds


def wait_for(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def test_training_pauses_until_the_board_has_cooled(
    bench: Any, board: FakeMachine, sensors: Monitor, tmp_path: Path
) -> None:
    plain = bench.train(bench.model(), bench.job(tmp_path / "plain", max_steps=6))
    losses = bench.values("step", "loss")
    job = bench.job(tmp_path / "hot", max_steps=6, monitor=sensors, max_temperature=85.0)
    set_heat(board, 88.0)
    wait_for(lambda: sensors.temperature == 88.0)

    def cool() -> None:
        wait_for(lambda: bench.values("pause", "step"))
        set_heat(board, 82.0)  # below the limit, but not by enough
        time.sleep(0.3)
        assert not bench.values("pause_end", "step")
        set_heat(board, 79.0)

    cooling = threading.Thread(target=cool)
    cooling.start()
    progress = bench.train(bench.model(), job)
    cooling.join()
    assert bench.values("pause", "step") == bench.values("pause_end", "step") == [1]
    assert (bench.values("pause", "temperature"), bench.values("pause", "until")) == (
        [88.0],
        [80.0],
    )
    (paused,) = bench.values("pause_end", "seconds")
    assert paused >= 0.3
    assert bench.values("step", "loss") == losses
    assert progress.train_seconds < plain.train_seconds + paused, "pauses aren't training"
    kinds = [event["kind"] for event in bench.events]
    assert kinds.index("step") < kinds.index("pause"), "the step is emitted before"


def test_a_stop_is_obeyed_while_paused(
    bench: Any, board: FakeMachine, sensors: Monitor, tmp_path: Path
) -> None:
    set_heat(board, 95.0)
    wait_for(lambda: sensors.temperature == 95.0)
    job = bench.job(
        tmp_path, lambda: bool(bench.values("pause", "step")), monitor=sensors, max_temperature=85.0
    )
    progress = bench.train(bench.model(), job)
    assert progress.step == 1 and not progress.is_complete
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-1", [])


def test_without_a_limit_or_below_it_nothing_happens(
    bench: Any, sensors: Monitor, tmp_path: Path
) -> None:
    for limit in (None, 61.0):
        job = bench.job(tmp_path / str(limit), max_steps=2, monitor=sensors, max_temperature=limit)
        assert bench.train(bench.model(), job).is_complete
        assert not bench.values("pause", "step") and not bench.values("warning", "message")


def test_a_limit_that_no_sensor_can_hold_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.sensors_temperatures", dict, raising=False)
    root = FakeMachine(tmp_path, LAPTOP).root
    with Monitor(Telemetry(root, path="")) as sensors:
        guard, kinds = make_guard(sensors)
        assert not guard.wait(1) and not guard.wait(2)
    assert kinds == ["warning"]


def test_a_sensor_that_falls_silent_lets_training_go_on(
    board: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FallsSilent(DistributedContext):
        """Silences the sensor once the guard has seen that the board is hot."""

        def all_reduce_sum(self, values: Any) -> list[float]:
            monkeypatch.setattr("jetson_ft.hardware.monitor.STALE_SECONDS", 0.0)
            return list(values)

    set_heat(board, 95.0)
    with Monitor(Telemetry(board.root, path=""), interval=0.02) as sensors:
        wait_for(lambda: sensors.temperature == 95.0)
        guard, kinds = make_guard(sensors, FallsSilent())
        assert not guard.wait(1)
    assert kinds == ["pause", "pause_end"]


def test_one_hot_machine_is_waited_for_by_all(board: FakeMachine, sensors: Monitor) -> None:
    """Seen from a machine that is cool itself; one reading misses the hot one."""

    class Others(DistributedContext):
        answers = iter([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])

        def all_reduce_sum(self, values: Any) -> list[float]:
            return [*values[:-1], values[-1] + next(self.answers)]

    guard, kinds = make_guard(sensors, Others())
    assert not guard.wait(3) and kinds == ["pause", "pause_end"]
    assert next(Others.answers, None) is None


def test_energy_is_of_the_steps_alone(
    bench: Any, board: FakeMachine, sensors: Monitor, tmp_path: Path
) -> None:
    progress = bench.train(bench.model(), bench.job(tmp_path, max_steps=4, monitor=sensors))
    watts = Telemetry(board.root, path="").read().watts
    assert progress.energy_joules == pytest.approx(watts * progress.train_seconds, rel=1e-3)
    kept = checkpoint.read_state(tmp_path / "step-4")
    assert kept.energy_joules == progress.energy_joules


def test_a_run_without_sensor_has_no_energy_and_never_gets_one(
    bench: Any, sensors: Monitor, tmp_path: Path
) -> None:
    first = bench.train(bench.model(), bench.job(tmp_path, max_steps=3))
    assert first.energy_joules is None
    job = bench.job(tmp_path, max_steps=5, monitor=sensors)
    assert bench.train(bench.model(), job, tmp_path / "step-3").energy_joules is None
