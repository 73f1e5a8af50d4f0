"""Several processes learn what one learns, decide alike, and notice when one is gone."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import rank_worker
from rank_worker import Scenario

from jetson_ft.training import checkpoint

pytestmark = pytest.mark.slow

FAST = {"warmup_steps": 0, "learning_rate": 1e-2, "eval_every": 4}


@pytest.fixture
def make(tiny_phi: Path, rows_file: Path, tmp_path: Path) -> Any:
    def scenario(name: str = "x", train: dict[str, Any] | None = None, **more: Any) -> Scenario:
        home = tmp_path / name
        home.mkdir()
        settings = FAST | (train or {})
        return Scenario(str(tiny_phi), str(rows_file), str(home), settings, **more)

    return scenario


def together(scenario: Scenario, size: int = 2, limit: float = 150.0) -> list[Any]:
    """What each process left, None for one that was killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = forked.context()
    started = [
        context.Process(target=rank_worker.work, args=(scenario, rank, size, port))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + limit
    waited_for = [p for rank, p in enumerate(started) if not scenario.acts("hang", rank)]
    for process in waited_for:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [process.is_alive() for process in waited_for]
    for process in started:
        process.kill()
        process.join()
    assert not any(late), "a process hangs"
    return [_left(Path(scenario.home) / f"rank-{rank}.json") for rank in range(size)]


def _left(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def of(result: Any, kind: str, key: str) -> list[Any]:
    return [event[key] for event in result["events"] if event["kind"] == kind]


def adapter(scenario: Scenario, rank: int = 0) -> dict[str, Any]:
    return checkpoint.load_tensors(Path(scenario.home) / f"rank-{rank}.safetensors")


def farthest(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys() and first
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def same_lesson(one: Any, several: Any) -> None:
    """Losses, gradients and counters of each step, and the held-out losses."""
    for kind, key in (("step", "loss"), ("step", "grad_norm"), ("eval", "heldout_loss")):
        assert of(several, kind, key) == pytest.approx(of(one, kind, key), abs=1e-5)
    for key in ("step", "lr", "tokens"):
        assert of(several, "step", key) == of(one, "step", key)
    counters = ("rows", "tokens", "supervised_tokens", "best_step", "total_steps")
    assert [several["progress"][c] for c in counters] == [one["progress"][c] for c in counters]


@pytest.fixture(scope="module")
def alone(tiny_phi: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process's nine steps: (scenario, what it left)."""
    home = tmp_path_factory.mktemp("alone")
    scenario = Scenario(str(tiny_phi), str(rows_file), str(home), FAST)
    return scenario, together(scenario, size=1)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_several_learn_what_one_learns(make: Any, alone: Any, size: int) -> None:
    scenario = make()
    results = together(scenario, size)
    for rank, result in enumerate(results):
        same_lesson(alone[1], result)
        assert farthest(adapter(scenario, rank), adapter(alone[0])) < 1e-5
    assert of(results[0], "checkpoint", "step") and not of(results[1], "checkpoint", "step")


def test_a_process_without_rows_waits_for_the_others(make: Any) -> None:
    """Steps of one row: there is nothing for a second process."""
    lonely = {"tokens_per_step": 16, "max_steps": 3}
    one, two = make("one", lonely), make("two", lonely)
    same_lesson(together(one, 1)[0], together(two, 2)[1])
    assert farthest(adapter(one), adapter(two, 1)) < 1e-5


def test_all_begin_with_the_first_ones_adapter(make: Any, alone: Any) -> None:
    scenario = make(ranks=(1,), seed=7)
    together(scenario)
    assert farthest(adapter(scenario, 1), adapter(alone[0])) < 1e-5


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_ends_all_after_the_same_step_and_one_goes_on(
    make: Any, alone: Any, asked: int
) -> None:
    scenario = make("stopped", act="stop", ranks=(asked,))
    assert [r["progress"]["step"] for r in together(scenario)] == [3, 3]
    folder, faults = checkpoint.newest_intact(Path(scenario.home) / "checkpoints")
    assert folder and folder.name == "step-3" and not faults
    resumed = make("resumed", resume=str(folder))
    left = together(resumed, 1)[0]
    assert of(left, "step", "loss") == pytest.approx(of(alone[1], "step", "loss")[3:], abs=1e-5)
    assert farthest(adapter(resumed), adapter(alone[0])) < 1e-5


def test_several_go_on_from_a_checkpoint_that_only_the_first_has(make: Any, alone: Any) -> None:
    stopped = make("stopped", act="stop", ranks=(0,))
    together(stopped, 1)
    resumed = make("resumed", resume=str(Path(stopped.home) / "checkpoints" / "step-3"))
    for rank, left in enumerate(together(resumed)):
        assert of(left, "step", "step")[0] == 4
        assert farthest(adapter(resumed, rank), adapter(alone[0])) < 1e-5


def test_minutes_become_the_same_number_of_steps_for_all(make: Any) -> None:
    scenario = make(train={"max_minutes": 1e-3, "epochs": 50.0, "eval_every": 100})
    first, second = together(scenario)
    assert of(first, "length", "total_steps") == of(second, "length", "total_steps")
    assert first["progress"]["step"] == second["progress"]["step"] < 450


def test_a_killed_process_is_named_and_ends_the_others(make: Any) -> None:
    scenario = make(train={"checkpoint_minutes": 1e-9}, act="die", ranks=(1,))
    first, second, third = together(scenario, 3)
    assert "UserError: Process 1 on machine 0" in first["error"]
    assert "--resume RUN" in first["error"]
    assert second is None and "stopped answering" in third["error"]
    folder, _ = checkpoint.newest_intact(Path(scenario.home) / "checkpoints")
    assert folder and folder.name == "step-2"
    told = (Path(scenario.home) / "rank-0.json").stat().st_mtime
    assert told - folder.stat().st_mtime < 20, "patience is four seconds, and the roll call's too"


def test_a_silent_process_is_named_once_patience_is_at_its_end(make: Any) -> None:
    first, second = together(make(act="hang", ranks=(1,)))
    assert "UserError: Process 1 on machine 0" in first["error"] and second is None


# Layers that are split


@pytest.mark.parametrize("recompute", [False, True])
def test_split_layers_learn_what_whole_ones_do(make: Any, alone: Any, recompute: bool) -> None:
    """Micro-batches of one row each, so that the processes have different numbers of them."""
    scenario = make(split=True, recompute=recompute, capacity=1)
    results = together(scenario)
    for rank, result in enumerate(results):
        same_lesson(alone[1], result)
        assert farthest(adapter(scenario, rank), adapter(alone[0])) < 1e-5
        assert result["bytes"] < 0.8 * alone[1]["bytes"]  # half of it are layers


def test_a_process_without_rows_makes_idle_passes(make: Any) -> None:
    lonely = {"tokens_per_step": 16, "max_steps": 3}
    one, two = make("one", lonely), make("two", lonely, split=True)
    same_lesson(together(one, 1)[0], together(two, 2)[1])


def test_one_alone_goes_on_from_the_checkpoint_of_a_split_run(make: Any, alone: Any) -> None:
    stopped = make("stopped", act="stop", ranks=(0,), split=True)
    together(stopped)
    resumed = make("resumed", resume=str(Path(stopped.home) / "checkpoints" / "step-3"))
    together(resumed, 1)
    assert farthest(adapter(resumed), adapter(alone[0])) < 1e-5


def test_a_killed_process_is_named_where_layers_are_split(make: Any) -> None:
    first, second = together(make(act="die", ranks=(1,), split=True))
    assert "UserError: Process 1 on machine 0" in first["error"] and second is None


def test_an_infinite_loss_of_one_ends_all_alike(make: Any) -> None:
    results = together(make(act="spoil", ranks=(1,)))
    assert all("loss became infinite at step 4" in result["error"] for result in results)
