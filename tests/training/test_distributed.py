"""Several processes train as one does, stop after the same step, and detect a lost process."""

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
from safetensors.torch import load_file
from training_bench import field_values

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


def run_ranks(scenario: Scenario, size: int = 2, limit: float = 150.0) -> list[Any]:
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
    return field_values(result["events"], kind, key)


def adapter(scenario: Scenario, rank: int = 0) -> dict[str, Any]:
    return load_file(Path(scenario.home) / f"rank-{rank}.safetensors")


def max_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys() and first
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


def assert_same_training(one: Any, several: Any) -> None:
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
    return scenario, run_ranks(scenario, size=1)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_give_the_losses_of_one(make: Any, alone: Any, size: int) -> None:
    scenario = make()
    results = run_ranks(scenario, size)
    for rank, result in enumerate(results):
        assert_same_training(alone[1], result)
        assert max_difference(adapter(scenario, rank), adapter(alone[0])) < 1e-5
    assert of(results[0], "checkpoint", "step") and not of(results[1], "checkpoint", "step")


@pytest.mark.promise(57)
def test_dropout_is_the_same_for_any_number_of_processes(make: Any) -> None:
    one, two = make("one", dropout=0.1), make("two", dropout=0.1, capacity=100, recompute=True)
    assert_same_training(run_ranks(one, 1)[0], run_ranks(two, 2)[1])
    assert max_difference(adapter(one), adapter(two, 1)) < 1e-5


def test_ranks_with_different_micro_batches_give_the_losses_of_one(make: Any, alone: Any) -> None:
    for result in run_ranks(make(capacity=64, capacity_step=200), 2):
        assert_same_training(alone[1], result)


def test_a_rank_without_rows_waits_for_the_others(make: Any) -> None:
    """Steps of one row: there is nothing for a second process."""
    lonely = {"tokens_per_step": 16, "max_steps": 3}
    one, two = make("one", lonely), make("two", lonely)
    assert_same_training(run_ranks(one, 1)[0], run_ranks(two, 2)[1])
    assert max_difference(adapter(one), adapter(two, 1)) < 1e-5


def test_all_ranks_start_with_rank_0s_adapter(make: Any, alone: Any) -> None:
    scenario = make(ranks=(1,), seed=7)
    run_ranks(scenario)
    assert max_difference(adapter(scenario, 1), adapter(alone[0])) < 1e-5


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_ends_all_ranks_after_the_same_step_and_one_can_resume(
    make: Any, alone: Any, asked: int
) -> None:
    scenario = make("stopped", act="stop", ranks=(asked,))
    assert [r["progress"]["step"] for r in run_ranks(scenario)] == [3, 3]
    folder, faults = checkpoint.newest_intact(Path(scenario.home) / "checkpoints")
    assert folder and folder.name == "step-3" and not faults
    resumed = make("resumed", resume=str(folder))
    left = run_ranks(resumed, 1)[0]
    assert of(left, "step", "loss") == pytest.approx(of(alone[1], "step", "loss")[3:], abs=1e-5)
    assert max_difference(adapter(resumed), adapter(alone[0])) < 1e-5


def test_all_ranks_resume_from_a_checkpoint_that_only_rank_0_has(make: Any, alone: Any) -> None:
    stopped = make("stopped", act="stop", ranks=(0,))
    run_ranks(stopped, 1)
    resumed = make("resumed", resume=str(Path(stopped.home) / "checkpoints" / "step-3"))
    for rank, left in enumerate(run_ranks(resumed)):
        assert of(left, "step", "step")[0] == 4
        assert max_difference(adapter(resumed, rank), adapter(alone[0])) < 1e-5


def test_minutes_give_all_ranks_the_same_number_of_steps(make: Any) -> None:
    scenario = make(train={"max_minutes": 1e-3, "epochs": 50.0, "eval_every": 100})
    first, second = run_ranks(scenario)
    totals = of(first, "total_steps", "total_steps")
    assert totals and totals == of(second, "total_steps", "total_steps")
    assert first["progress"]["step"] == second["progress"]["step"] < 450


def test_a_killed_rank_is_named_and_ends_the_others(make: Any) -> None:
    scenario = make(train={"save_minutes": 1e-9}, act="die", ranks=(1,))
    first, second, third = run_ranks(scenario, 3)
    assert "UserError: Process 1 on machine 0" in first["error"]
    assert "--resume RUN" in first["error"]
    assert second is None and "stopped answering" in third["error"]
    folder, _ = checkpoint.newest_intact(Path(scenario.home) / "checkpoints")
    assert folder and folder.name == "step-2"
    reported_at = (Path(scenario.home) / "rank-0.json").stat().st_mtime
    assert reported_at - folder.stat().st_mtime < 20, (
        "timeouts: 4 s for a collective, 4 s for the check that names lost ranks"
    )


def test_a_killed_main_process_is_named_alone_though_the_store_dies_with_it(make: Any) -> None:
    killed, second, third = run_ranks(make(act="die", ranks=(0,)), 3)
    assert killed is None
    for survivor in (second, third):
        assert "Process 0 on machine 0" in survivor["error"]
        assert "1 on machine" not in survivor["error"]


def test_a_hanging_rank_is_named_after_the_timeout(make: Any) -> None:
    first, second = run_ranks(make(act="hang", ranks=(1,)))
    assert "UserError: Process 1 on machine 0" in first["error"] and second is None


# Layers that are split


@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_layers_give_the_losses_of_whole_ones(
    make: Any, alone: Any, recompute: bool
) -> None:
    """Micro-batches of one row each, so that the processes have different numbers of them."""
    scenario = make(split=True, recompute=recompute, capacity=1)
    results = run_ranks(scenario)
    for rank, result in enumerate(results):
        assert_same_training(alone[1], result)
        assert max_difference(adapter(scenario, rank), adapter(alone[0])) < 1e-5
        assert result["bytes"] < 0.8 * alone[1]["bytes"]  # half of it are layers


def test_a_rank_without_rows_passes_dummy_batches(make: Any) -> None:
    lonely = {"tokens_per_step": 16, "max_steps": 3}
    one, two = make("one", lonely), make("two", lonely, split=True)
    assert_same_training(run_ranks(one, 1)[0], run_ranks(two, 2)[1])


def test_one_process_resumes_the_checkpoint_of_a_sharded_run(make: Any, alone: Any) -> None:
    stopped = make("stopped", act="stop", ranks=(0,), split=True)
    run_ranks(stopped)
    resumed = make("resumed", resume=str(Path(stopped.home) / "checkpoints" / "step-3"))
    run_ranks(resumed, 1)
    assert max_difference(adapter(resumed), adapter(alone[0])) < 1e-5


def test_a_killed_rank_is_named_when_layers_are_sharded(make: Any) -> None:
    first, second = run_ranks(make(act="die", ranks=(1,), split=True))
    assert "UserError: Process 1 on machine 0" in first["error"] and second is None


def test_an_infinite_loss_on_one_rank_ends_all(make: Any) -> None:
    results = run_ranks(make(act="spoil", ranks=(1,)))
    assert all("loss is not finite at step 4" in result["error"] for result in results)
