"""A board that is too hot is waited for, between steps, and nothing else changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards_in_folders import LAPTOP, NANO, Folder

from jetson_ft.device.monitor import Monitor
from jetson_ft.device.telemetry import Anything, Telemetry
from jetson_ft.training import checkpoint, heat
from jetson_ft.training.group import Group
from jetson_ft.training.heat import Heat


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(heat, "_LOOK_SECONDS", 0.02)
    made = Folder(tmp_path / "board", NANO)
    set_heat(made, 60.0)
    return made


def set_heat(board: Folder, tj: float) -> None:
    board.heat({"cpu": 50.0, "gpu": 50.0, "tj": tj})


@pytest.fixture
def sensors(board: Folder) -> Iterator[Monitor]:
    with Monitor(Telemetry(board.root, path=""), every=0.02) as found:
        wait_for(lambda: found.temperature == 60.0)
        yield found


def wait_for(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def test_training_pauses_until_the_board_has_cooled(
    bench: Any, board: Folder, sensors: Monitor, tmp_path: Path
) -> None:
    plain = bench.fit(bench.model(), bench.job(tmp_path / "plain", max_steps=6))
    losses = bench.of("step", "loss")
    job = bench.job(tmp_path / "hot", max_steps=6, monitor=sensors, max_temperature=85.0)
    set_heat(board, 88.0)
    wait_for(lambda: sensors.temperature == 88.0)

    def cool() -> None:
        wait_for(lambda: bench.of("pause", "step"))
        set_heat(board, 82.0)  # below the limit, but not by enough
        time.sleep(0.3)
        assert not bench.of("pause_end", "step")
        set_heat(board, 79.0)

    cooling = threading.Thread(target=cool)
    cooling.start()
    progress = bench.fit(bench.model(), job)
    cooling.join()
    assert bench.of("pause", "step") == bench.of("pause_end", "step") == [1]
    assert (bench.of("pause", "temperature"), bench.of("pause", "until")) == ([88.0], [80.0])
    (paused,) = bench.of("pause_end", "seconds")
    assert paused >= 0.3
    assert bench.of("step", "loss") == losses
    assert progress.train_seconds < plain.train_seconds + paused, "pauses aren't training"
    kinds = [event["kind"] for event in bench.events]
    assert kinds.index("step") < kinds.index("pause"), "the step is told before"


def test_a_stop_is_obeyed_while_paused(
    bench: Any, board: Folder, sensors: Monitor, tmp_path: Path
) -> None:
    set_heat(board, 95.0)
    wait_for(lambda: sensors.temperature == 95.0)
    job = bench.job(
        tmp_path, lambda: bool(bench.of("pause", "step")), monitor=sensors, max_temperature=85.0
    )
    progress = bench.fit(bench.model(), job)
    assert progress.step == 1 and not progress.complete
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-1", [])


def test_without_a_limit_or_below_it_nothing_happens(
    bench: Any, sensors: Monitor, tmp_path: Path
) -> None:
    for limit in (0.0, 61.0):
        job = bench.job(tmp_path / str(limit), max_steps=2, monitor=sensors, max_temperature=limit)
        assert bench.fit(bench.model(), job).complete
        assert not bench.of("pause", "step") and not bench.of("warning", "message")


def test_a_limit_that_no_sensor_can_hold_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Anything, "_heat", lambda *_: {})
    said: list[str] = []
    root = Folder(tmp_path, LAPTOP).root
    with Monitor(Telemetry(root, path="")) as sensors:
        found = Heat(85.0, sensors, Group(), lambda kind, **_: said.append(kind), lambda: False)
        assert not found.wait(1) and not found.wait(2)
    assert said == ["warning"]


def test_a_sensor_that_falls_silent_lets_training_go_on(
    board: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    set_heat(board, 95.0)
    with Monitor(Telemetry(board.root, path=""), every=0.02) as sensors:
        wait_for(lambda: sensors.temperature == 95.0)
        found = Heat(85.0, sensors, Group(), lambda kind, **_: said.append(kind), lambda: False)
        monkeypatch.setattr("jetson_ft.device.monitor.STALE_SECONDS", 0.0)
        assert not found._until_cool()


def test_one_hot_machine_is_waited_for_by_all(board: Folder, sensors: Monitor) -> None:
    """Seen from a machine that is cool itself; one reading misses the hot one."""

    class Others(Group):
        answers = iter([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])

        def sum(self, values: Any) -> list[float]:
            return [*values[:-1], values[-1] + next(self.answers)]

    said: list[str] = []
    found = Heat(85.0, sensors, Others(), lambda kind, **_: said.append(kind), lambda: False)
    assert not found.wait(3) and said == ["pause", "pause_end"]
    assert next(Others.answers, None) is None


def test_energy_is_of_the_steps_alone(bench: Any, sensors: Monitor, tmp_path: Path) -> None:
    progress = bench.fit(bench.model(), bench.job(tmp_path, max_steps=4, monitor=sensors))
    watts = sensors._telemetry.read().watts if sensors._telemetry else None
    assert progress.energy_joules == pytest.approx(watts * progress.train_seconds, rel=1e-3)
    kept = checkpoint.read_progress(tmp_path / "step-4")
    assert kept.energy_joules == progress.energy_joules


def test_a_run_without_sensor_has_no_energy_and_never_gets_one(
    bench: Any, sensors: Monitor, tmp_path: Path
) -> None:
    first = bench.fit(bench.model(), bench.job(tmp_path, max_steps=3))
    assert first.energy_joules is None
    job = bench.job(tmp_path, max_steps=5, monitor=sensors)
    assert bench.fit(bench.model(), job, tmp_path / "step-3").energy_joules is None
