"""Out-of-memory errors raised at a step: the message, and the second attempt."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.events import PHASES, Failed, PhaseStarted, Step, Warned
from jetson_ft.hardware.boards import find_board
from jetson_ft.recipe import Recipe
from jetson_ft.runs import contract, exit_status, oom, store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.oom import OutOfMemory
from jetson_ft.runs.processes import DistributedConfig, write_distributed_config
from jetson_ft.runs.store import Run
from jetson_ft.training import cost_model, planner
from jetson_ft.training.memory import is_out_of_memory

NVMAP = "NvMapMemAllocInternalTagged: 1075072515 error 12"
NVML = "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:838"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"


def plan_of(run: Run) -> dict[str, Any]:
    return run.plan()


def last_error(run: Run) -> Failed:
    return [event for event in run.events() if isinstance(event, Failed)][-1]


def steps(run: Run) -> list[Step]:
    return [event for event in run.events() if isinstance(event, Step)]


def losses(run: Run) -> list[float | None]:
    return [event.loss for event in steps(run)]


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shrunk(workbench: Any) -> Run:
    """A run that ran out of memory at its sixth step, and its second attempt."""
    run: Run = workbench.run("shrunk", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="step-6", FAULT=NVMAP) == exit_status.EXIT_RETRY
    run.warned = [e.message for e in run.events() if isinstance(e, Warned)][-1]  # type: ignore[attr-defined]
    run.first_plan = plan_of(run)  # type: ignore[attr-defined]
    assert workbench.work(run) == 0, (run.path / "log.txt").read_text()
    return run


def test_second_attempt_uses_the_next_smaller_plan(shrunk: Any) -> None:
    first, second = shrunk.first_plan, plan_of(shrunk)
    assert not first["checkpointing"] and second["checkpointing"]
    assert second["peak_memory_bytes"] < first["peak_memory_bytes"]
    assert (
        second["peak_memory_bytes"]
        <= first["memory_limit_gb"] * 10**9
        == second["memory_limit_gb"] * 10**9
    )
    assert "Out of memory in training, with micro-batches of" in shrunk.warned
    assert "starts again from the last checkpoint, once, with micro-batches" in shrunk.warned
    assert "activations recomputed" in shrunk.warned
    assert not [event for event in shrunk.events() if isinstance(event, Failed)]


def test_second_attempt_continues_from_the_checkpoint_with_the_same_losses(
    shrunk: Run, finished: Run
) -> None:
    made = steps(shrunk)
    assert [event.attempt for event in made] == [1] * 4 + [2] * (len(made) - 4)
    assert losses(shrunk) == pytest.approx(losses(finished), abs=1e-4)
    report = json.loads((shrunk.path / "report.json").read_text())
    assert report["train"]["rows"] == 35


def test_second_out_of_memory_fails_the_run(workbench: Any) -> None:
    run = workbench.run("hungry", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="step-3", FAULT=CUDA) == exit_status.EXIT_RETRY
    limit = plan_of(run)["memory_limit_gb"]
    assert workbench.work(run, FAULT_AT="step-3", FAULT=CUDA) == exit_status.EXIT_FAILED
    assert plan_of(run)["memory_limit_gb"] == limit
    assert "No plan takes less" in last_error(run).fix
    assert oom.smaller_plan_settings(run) == []


def test_on_oom_stop_fails_and_the_named_command_continues(workbench: Any) -> None:
    run = workbench.run("stopping")
    assert workbench.work(run, FAULT_AT="step-6", FAULT=NVML) == exit_status.EXIT_FAILED
    first, error = plan_of(run), last_error(run)
    assert "memory_limit_gb" not in first and "Out of memory in training" in error.what
    (command,) = re.findall(r"`(jetson-ft train [^`]+)`", error.fix)
    *_, resumed, _, override = shlex.split(command)
    assert Run(Path(resumed)).path == run.path
    assert oom.smaller_plan_settings(run) == [override]
    words = run.events_file.read_text()
    other_words = words.replace("Or close other programs", "Or wait")
    assert other_words != words
    run.events_file.write_text(other_words)
    assert oom.smaller_plan_settings(run) == [override], "as of a version with other texts"
    granted = Recipe.model_validate({"train": {"max_memory_gb": float(override.split("=")[1])}})
    recipe = run.recipe()
    recipe.train.max_memory_gb = granted.train.max_memory_gb
    contract.check_only_longer(run, run.recipe(), recipe)
    (run.path / "recipe.yaml").write_text(recipe.to_yaml())
    assert workbench.work(run) == 0
    assert plan_of(run)["checkpointing"] and not first["checkpointing"]


def test_other_errors_are_not_changed(workbench: Any) -> None:
    run = workbench.run("other", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="step-3", FAULT="shapes differ") == exit_status.EXIT_FAILED
    assert "shapes differ" in last_error(run).what


@pytest.mark.slow
def test_out_of_memory_before_training_is_not_tried_again(workbench: Any) -> None:
    run = workbench.run("elsewhere", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="weights", FAULT=CUDA) == exit_status.EXIT_FAILED
    assert last_error(run).what == "Out of memory."


# --- the supervisor's part -----------------------------------------------------------------------


def test_supervisor_starts_the_worker_again_once(light_runs: Any) -> None:
    run = light_runs.launch("hungry")
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert run.state().attempt == 2 and (run.path / "worked-2").exists()


def test_supervisor_starts_the_worker_again_not_twice(light_runs: Any) -> None:
    run = light_runs.launch("always-hungry")
    assert light_runs.wait(run, *store.ENDED_STATES) == "failed"
    assert run.state().attempt == 2


def test_stop_requested_meanwhile_prevents_the_second_attempt(queued: Any) -> None:
    from jetson_ft.runs import supervisor

    run = queued("hungry")
    run.request_stop()
    with open(run.path / "slot", "ab") as slot:
        assert supervisor._run_attempts(run, slot, supervisor._run_worker).state == "stopped"
    assert not (run.path / "worked-2").exists()


# --- the limits ----------------------------------------------------------------------------------


def workload(**train: Any) -> Any:
    from jetson_ft.data import lengths
    from jetson_ft.models.catalog import KNOWN_DIMS
    from jetson_ft.models.loading import WeightFormat

    recipe = Recipe.model_validate({"train": {"tokens_per_step": 6500, **train}})
    rows = lengths.KNOWN_LENGTHS["llamafactory/alpaca_zh", "microsoft/phi-1_5"]
    shape = KNOWN_DIMS["microsoft/phi-1_5"]
    return cost_model.Workload(shape, WeightFormat("bf16"), recipe.lora, recipe.train, rows, 1000.0)


def stored(run: Run, **values: Any) -> Run:
    run.path.mkdir(exist_ok=True)
    (run.path / "plan.json").write_text(json.dumps({"schema": 1, **values}))
    return run


@pytest.mark.parametrize(
    ("on_oom", "stored_limit", "limit", "expected"),
    [("shrink", 3.0, None, 3.0), ("shrink", 3.0, 2.0, 2.0), ("shrink", 3.0, 5.0, 3.0),
     ("shrink", None, None, None), ("stop", 3.0, None, None), ("stop", 3.0, 5.0, 5.0)],
)  # fmt: skip
def test_lower_of_stored_limit_and_recipes_limit_applies(
    on_oom: str, stored_limit: Any, limit: float, expected: float, tmp_path: Path
) -> None:
    values = {} if stored_limit is None else {"memory_limit_gb": stored_limit}
    run = stored(Run(tmp_path), **values)
    limited = oom.limit_memory(run, workload(on_oom=on_oom, max_memory_gb=limit))
    assert limited.train.max_memory_gb == expected


def out_of_memory(folder: Path, phase: str, processes: int = 1) -> tuple[Run, OutOfMemory]:
    """Return a run whose only attempt got so far, and its error; `train.on_oom` is `shrink`."""
    recipe = Recipe.model_validate({"output_dir": str(folder), "train": {"on_oom": "shrink"}})
    run, device, one = (
        store.create_run(recipe, "x"),
        find_board("orin-nx-16gb").device(),
        workload(),
    )
    run.write_state("running")
    plan = planner.choose_plan(one, device, 1e12)
    stored(run, **oom.plan_as_json(one, plan, device))
    write_distributed_config(run, DistributedConfig(nproc_per_node=processes))
    EventLog(run, 1).emit(PhaseStarted(name=phase))
    return run, oom.explain_oom(run)


def test_several_processes_get_no_second_attempt(tmp_path: Path) -> None:
    run, error = out_of_memory(tmp_path, "training", processes=2)
    assert "4,096 tokens" in str(error.what)
    assert not error.retry and "2,048 tokens" in str(error.fix)
    assert "memory_limit_gb" not in plan_of(run)
    run, error = out_of_memory(tmp_path, "training")
    assert error.retry and plan_of(run)["memory_limit_gb"]


def test_smaller_plan_is_named_only_where_it_helps(tmp_path: Path) -> None:
    for phase in ("sharding", "comparison"):
        _run, error = out_of_memory(tmp_path, phase)
        assert error.retry and "4,096 tokens" in str(error.what)
        assert PHASES[phase] in str(error.where)
    for phase in ("libraries", "data", "model"):
        _run, error = out_of_memory(tmp_path, phase)
        assert not error.retry and str(error.what) == "Out of memory."
        assert PHASES[phase] in str(error.where)


@pytest.mark.parametrize("text", [CUDA, NVML, NVMAP])
def test_errors_of_the_gpu_are_out_of_memory(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(RuntimeError("other"))


def test_limit_is_just_enough_for_the_next_plan() -> None:
    """Down to the last one, on every kind of device."""
    for board in ("orin-nano-8gb", "agx-orin-64gb"):
        device, one = find_board(board).device(), workload()
        plan: Any = next(planner.candidate_plans(one, device))
        sizes = [plan.micro_batch_tokens]
        while smaller := planner.next_smaller_plan(one, device, plan):
            limit = {"max_memory_gb": planner.memory_limit_gb(smaller)}
            limited = replace(one, train=one.train.model_copy(update=limit))
            chosen = planner.best_plan(limited, device, 1e12)
            assert chosen and (chosen.micro_batch_tokens, chosen.checkpointing) == (
                smaller.micro_batch_tokens, smaller.checkpointing,
            )  # fmt: skip
            plan = smaller
            sizes.append(plan.micro_batch_tokens)
        assert len(sizes) >= 5 and plan.checkpointing


def test_rows_alone_leave_only_recomputing() -> None:
    device, one = find_board("orin-nx-16gb").device(), workload()
    plan = replace(next(planner.candidate_plans(one, device)), micro_batch_tokens=0)
    smaller = planner.next_smaller_plan(one, device, plan)
    assert smaller and smaller.checkpointing
    alone = replace(smaller, micro_batch_tokens=0)
    assert planner.next_smaller_plan(one, device, alone) is None
