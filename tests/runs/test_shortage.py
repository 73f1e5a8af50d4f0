"""Too little memory, put into a run at a step: what is said, and the second attempt."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.device.boards import find
from jetson_ft.paths import read_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs import ending, jobs, rundir, shortage
from jetson_ft.runs.rundir import Run
from jetson_ft.training import planner
from jetson_ft.training.group import Group
from jetson_ft.training.memory import OutOfMemory

NVMAP = "NvMapMemAllocInternalTagged: 1075072515 error 12"
NVML = "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:838"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"


def plan_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run.path / "plan.json")
    return found


def last(run: Run, kind: str) -> dict[str, Any]:
    chosen: dict[str, Any] = [event for event in run.events() if event["kind"] == kind][-1]
    return chosen


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["kind"] == "step"]


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shrunk(workbench: Any) -> Run:
    """A run that ran out of memory at its sixth step, and its second attempt."""
    run: Run = workbench.run("shrunk", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="step-6", FAULT=NVMAP) == ending.EXIT_AGAIN
    run.warned = last(run, "warning")["message"]  # type: ignore[attr-defined]
    run.first_plan = plan_of(run)  # type: ignore[attr-defined]
    assert workbench.work(run) == 0, (run.path / "log.txt").read_text()
    return run


def test_the_second_attempt_takes_the_next_smaller_plan(shrunk: Any) -> None:
    first, second = shrunk.first_plan, plan_of(shrunk)
    assert not first["checkpointing"] and second["checkpointing"]
    assert second["peak_memory_bytes"] < first["peak_memory_bytes"]
    assert second["peak_memory_bytes"] <= first["grant_gb"] * 10**9 == second["grant_gb"] * 10**9
    assert "Out of memory in training, with micro-batches of" in shrunk.warned
    assert "starts again from the last checkpoint, once, with micro-batches" in shrunk.warned
    assert "activations recomputed" in shrunk.warned
    assert not [event for event in shrunk.events() if event["kind"] == "error"]


def test_it_goes_on_from_the_checkpoint_and_learns_the_same(shrunk: Run, finished: Run) -> None:
    made = [event for event in shrunk.events() if event["kind"] == "step"]
    assert [event["attempt"] for event in made] == [1] * 4 + [2] * (len(made) - 4)
    assert losses(shrunk) == pytest.approx(losses(finished), abs=1e-4)
    report = json.loads((shrunk.path / "report.json").read_text())
    assert report["train"]["rows"] == 35


def test_a_second_shortage_is_the_last_one(workbench: Any) -> None:
    run = workbench.run("hungry", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="step-3", FAULT=CUDA) == ending.EXIT_AGAIN
    granted = plan_of(run)["grant_gb"]
    assert workbench.work(run, FAULT_AT="step-3", FAULT=CUDA) == ending.EXIT_FAILED
    assert plan_of(run)["grant_gb"] == granted
    assert "No plan takes less" in last(run, "error")["fix"]


def test_by_default_it_stops_and_the_command_it_names_goes_on(workbench: Any) -> None:
    run = workbench.run("stopping")
    assert workbench.work(run, FAULT_AT="step-6", FAULT=NVML) == ending.EXIT_FAILED
    first, error = plan_of(run), last(run, "error")
    assert "grant_gb" not in first and "Out of memory in training" in error["what"]
    (command,) = re.findall(r"`(jetson-ft train [^`]+)`", error["fix"])
    *_, resumed, _, override = shlex.split(command)
    assert Run(Path(resumed)).path == run.path
    granted = Recipe.model_validate({"train": {"max_memory_gb": float(override.split("=")[1])}})
    recipe = run.recipe()
    recipe.train.max_memory_gb = granted.train.max_memory_gb
    jobs.check_only_longer(run, run.recipe(), recipe)
    (run.path / "recipe.yaml").write_text(recipe.to_yaml())
    assert workbench.work(run) == 0
    assert plan_of(run)["checkpointing"] and not first["checkpointing"]


def test_a_fault_of_another_kind_stays_what_it_is(workbench: Any) -> None:
    run = workbench.run("other", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="step-3", FAULT="shapes differ") == ending.EXIT_FAILED
    assert "shapes differ" in last(run, "error")["what"]


@pytest.mark.slow
def test_short_of_memory_elsewhere_no_smaller_plan_would_help(workbench: Any) -> None:
    run = workbench.run("elsewhere", on_oom="shrink")
    assert workbench.work(run, FAULT_AT="weights", FAULT=CUDA) == ending.EXIT_FAILED
    assert last(run, "error")["what"] == "Out of memory."


# --- the supervisor's part -----------------------------------------------------------------------


def test_the_supervisor_starts_it_again_once(shop: Any) -> None:
    run = shop.launch("hungry")
    assert shop.wait(run, *rundir.ENDED) == "finished"
    assert run.state().attempt == 2 and (run.path / "worked-2").exists()


def test_and_not_twice(shop: Any) -> None:
    run = shop.launch("always-hungry")
    assert shop.wait(run, *rundir.ENDED) == "failed"
    assert run.state().attempt == 2


def test_a_run_asked_to_stop_meanwhile_is_not_started_again(queued: Any) -> None:
    from jetson_ft.runs import supervisor

    run = queued("hungry")
    run.request_stop()
    with open(run.path / "slot", "ab") as slot:
        assert supervisor._work(run, slot) == ending.EXIT_STOPPED
    assert not (run.path / "worked-2").exists()


# --- the limits ----------------------------------------------------------------------------------


def work(**train: Any) -> Any:
    from jetson_ft.data import lengths
    from jetson_ft.models.load import Weights
    from jetson_ft.models.shapes import KNOWN

    recipe = Recipe.model_validate({"train": {"tokens_per_step": 6500, **train}})
    rows = lengths.KNOWN["llamafactory/alpaca_zh", "microsoft/phi-1_5"]
    shape = KNOWN["microsoft/phi-1_5"]
    return planner.Work(shape, Weights("bf16"), recipe.lora, recipe.train, rows, 1000.0)


def stored(run: Run, **values: Any) -> Run:
    run.path.mkdir(exist_ok=True)
    (run.path / "plan.json").write_text(json.dumps({"schema": 1, **values}))
    return run


@pytest.mark.parametrize(
    ("on_oom", "granted", "limit", "expected"),
    [("shrink", 3.0, 0.0, 3.0), ("shrink", 3.0, 2.0, 2.0), ("shrink", 3.0, 5.0, 3.0),
     ("shrink", None, 0.0, 0.0), ("stop", 3.0, 0.0, 0.0), ("stop", 3.0, 5.0, 5.0)],
)  # fmt: skip
def test_a_grant_and_a_limit_hold_both(
    on_oom: str, granted: Any, limit: float, expected: float, tmp_path: Path
) -> None:
    values = {} if granted is None else {"grant_gb": granted}
    run = stored(Run(tmp_path), **values)
    found = shortage.within_grant(run, work(on_oom=on_oom, max_memory_gb=limit))
    assert found.train.max_memory_gb == expected


@pytest.mark.parametrize("cause", [CUDA, NVML, NVMAP])
def test_processes_that_train_together_stop(cause: str, tmp_path: Path) -> None:
    device, one = find("orin-nx-16gb").device(), work(on_oom="shrink")
    plan = planner.choose(one, device, 1e12)
    run = stored(Run(tmp_path), **plan.as_json())
    group = Group()
    group.size = 2
    with pytest.raises(OutOfMemory) as caught, shortage.told(run, one, device, group):
        raise RuntimeError(cause)
    assert "4,096 tokens" in caught.value.what
    assert not caught.value.again and "2,048 tokens" in caught.value.fix
    assert "grant_gb" not in plan_of(run)
    with pytest.raises(OutOfMemory) as caught, shortage.told(run, one, device, Group()):
        raise RuntimeError(cause)
    assert caught.value.again and plan_of(run)["grant_gb"]


def test_what_is_granted_is_just_enough_for_the_next_plan() -> None:
    """Down to the last one, on every kind of device."""
    for board in ("orin-nano-8gb", "agx-orin-64gb"):
        device, one = find(board).device(), work()
        plan: Any = next(planner.plans(one, device))
        sizes = [plan.micro_batch_tokens]
        while smaller := planner.next_smaller(one, device, plan):
            limit = {"max_memory_gb": planner.grant(smaller)}
            limited = replace(one, train=one.train.model_copy(update=limit))
            chosen = planner.best(limited, device, 1e12)
            assert chosen and (chosen.micro_batch_tokens, chosen.checkpointing) == (
                smaller.micro_batch_tokens, smaller.checkpointing,
            )  # fmt: skip
            plan = smaller
            sizes.append(plan.micro_batch_tokens)
        assert len(sizes) >= 5 and plan.checkpointing


def test_where_each_row_is_alone_only_recomputing_helps() -> None:
    device, one = find("orin-nx-16gb").device(), work()
    plan = replace(next(planner.plans(one, device)), micro_batch_tokens=0)
    smaller = planner.next_smaller(one, device, plan)
    assert smaller and smaller.checkpointing
    alone = replace(smaller, micro_batch_tokens=0)
    assert planner.next_smaller(one, device, alone) is None
