"""Runs of several processes: the launcher, and the files that each process writes."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import whole_worker
from safetensors.torch import load_file

from jetson_ft.errors import UserError
from jetson_ft.events import KINDS, Failed, ProcessesConnected, Step
from jetson_ft.files import read_json, write_atomic
from jetson_ft.hardware import detect
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat
from jetson_ft.runs import exit_status, launcher, manager, pipeline, processes, store
from jetson_ft.runs.processes import DistributedConfig
from jetson_ft.runs.store import Run
from jetson_ft.training import planner
from jetson_ft.training.cost_model import describe_workload

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- the configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc_per_node": 0}, "At least one process"),
        ({"nnodes": 2, "node_rank": 2, "rendezvous": "a:1"}, "There is no machine 2 among 2"),
        ({"node_rank": 1}, "There is no machine 1 among 1"),
        ({"nnodes": 2}, "need a rendezvous address"),
        ({"nnodes": 2, "rendezvous": "10.0.0.1"}, "need a rendezvous address"),
    ],
)
def test_contradicting_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistributedConfig().with_options(**settings)


def test_resume_with_new_processes_replaces_the_old(light_runs: Any) -> None:
    old = DistributedConfig(nnodes=2, node_rank=0, rendezvous="10.0.0.1:29500")
    run = store.create_run(light_runs.recipe(), "plain")
    run.write_state("stopped")
    processes.write_distributed_config(run, old)
    assert (
        processes.read_distributed_config(run) == old
        and processes.read_distributed_config(run).needs_launcher
    )
    alone = processes.read_distributed_config(run).with_options(nnodes=1, nproc_per_node=None)
    assert not alone.needs_launcher
    manager.resume(run, config=alone)
    assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    assert not processes.read_distributed_config(run).needs_launcher


def test_environment_names_the_network_interface_of_the_rendezvous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    launcher._set_environment(DistributedConfig(nproc_per_node=2), "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1


# --- the launcher, with light workers ---------------------------------------------------------


def ranks(run: Run) -> dict[int, psutil.Process]:
    """Return the run's processes by their rank."""
    processes = {}
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[-2:] == ["jetson_ft.runs.worker", str(run.path)]:
            processes[int(process.environ()["RANK"])] = process
    return processes


@pytest.fixture
def pair(light_runs: Any) -> Any:
    """Return a function that launches a light run of two processes and waits until they work."""

    def launch(label: str) -> Run:
        run = manager.launch(light_runs.recipe(), label, DistributedConfig(nproc_per_node=2))
        light_runs.until(lambda: (run.path / "worked-1").exists(), 90.0)
        return run

    return launch


def test_two_processes_finish(light_runs: Any, pair: Any) -> None:
    run = pair("plain")
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "finished"
    assert [e.kind for e in run.events()] == ["exit"]


def test_resume_on_one_machine_needs_no_rendezvous(light_runs: Any, pair: Any) -> None:
    run = pair("endless")
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "stopped"
    config = DistributedConfig(
        nnodes=2, node_rank=0, rendezvous="nowhere.invalid:29500", nproc_per_node=2
    )
    manager.resume(run, config=config.with_options(nnodes=1))
    light_runs.until(lambda: (run.path / "worked-2").exists(), 90.0)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "stopped"


def test_two_processes_stop_on_request(light_runs: Any, pair: Any) -> None:
    run = pair("endless")
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "stopped"


def test_terminated_launcher_stops_the_run(light_runs: Any, pair: Any) -> None:
    run = pair("endless")
    (process,) = light_runs.supervisor(run).children()
    assert "jetson_ft.runs.launcher" in process.cmdline()
    process.terminate()
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "stopped"


@pytest.mark.parametrize("number", [0, 1])
def test_killed_process_fails_the_run_and_is_named(light_runs: Any, pair: Any, number: int) -> None:
    run = pair("endless")
    ranks(run)[number].kill()
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "failed"
    assert run.state().reason.startswith(f"Process {number} on machine 0")
    (error,) = [e for e in run.events() if isinstance(e, Failed)]
    assert error.where == f"ended by signal {signal.SIGKILL.value}"
    assert "--resume RUN" in error.fix and not ranks(run)


def test_refused_run_emits_one_error(light_runs: Any, pair: Any) -> None:
    run = pair("refused")
    assert light_runs.wait(run, *store.ENDED_STATES, seconds=60.0) == "failed"
    assert [e.what for e in run.events() if isinstance(e, Failed)] == ["No such file."]


def test_stop_ends_the_wait_for_another_machine(light_runs: Any) -> None:
    port = free_port()
    config = DistributedConfig(nnodes=2, rendezvous=f"127.0.0.1:{port}")
    run = manager.launch(light_runs.recipe(), "plain", config)
    light_runs.until(lambda: listens(port), 60.0)
    manager.stop(run)
    assert light_runs.wait(run, *store.ENDED_STATES) == "stopped"


# --- whole runs -------------------------------------------------------------------------------


def without_dropout(run: Run, **train: Any) -> Run:
    """Turn dropout off: each process drops other values, so that several never equal one."""
    recipe = run.recipe()
    recipe.lora.dropout = 0.0
    for key, value in train.items():
        setattr(recipe.train, key, value)
    write_atomic(run.path / "recipe.yaml", recipe.to_yaml())
    return run


def work_together(workbench: Any, runs: list[Run], kill_at: tuple[str, ...] = ("", "")) -> Any:
    """Run a process for each entry, on a machine for each folder; return the exit codes."""
    port, started = free_port(), []
    for rank, run in enumerate(runs):
        local = rank - runs.index(run)
        place = {
            "RANK": rank, "WORLD_SIZE": len(runs), "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": runs.count(run), "GROUP_RANK": rank - local,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            "JETSON_FT_DIST_TIMEOUT": 4, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        arguments = (str(run.path), kill_at[rank], {k: str(v) for k, v in place.items()})
        started.append(workbench.context.Process(target=whole_worker.work, args=arguments))
        started[-1].start()
    for process in started:
        process.join(90)
    return [process.exitcode for process in started]


@pytest.fixture(scope="module")
def alone(workbench: Any) -> Run:
    run = without_dropout(workbench.run("alone"))
    assert workbench.work(run) == 0, (run.path / "log.txt").read_text()
    return run


def values(run: Run, kind: str, key: str) -> list[Any]:
    return [getattr(event, key) for event in run.events() if isinstance(event, KINDS[kind])]


def weights(run: Run) -> dict[str, Any]:
    return load_file(run.adapter / "adapter_model.safetensors")


def same_adapter(run: Run, other: Run) -> None:
    others = weights(other)
    distance = max(float((v - others[name]).abs().max()) for name, v in weights(run).items())
    assert distance < 1e-5


def test_two_processes_equal_one(workbench: Any, alone: Run) -> None:
    run = without_dropout(workbench.run("two"))
    assert work_together(workbench, [run, run]) == [0, 0], (run.path / "log.txt").read_text()
    for kind, key in (("step", "loss"), ("eval", "heldout_loss"), ("eval", "bits_per_char")):
        assert values(run, kind, key) == pytest.approx(values(alone, kind, key), abs=1e-5)
    same_adapter(run, alone)
    lines = [json.loads(line)["kind"] for line in run.events_file.read_text().splitlines()]
    assert lines.count("step") == len(values(alone, "step", "loss")) and lines.count("exit") == 1
    (event,) = [e for e in run.events() if isinstance(e, ProcessesConnected)]
    assert (event.size, event.rank, event.backend) == (2, 0, "gloo")
    ours, theirs = (read_json(r.path / "report.json") for r in (run, alone))
    for key in ("steps", "rows", "tokens", "supervised_tokens"):
        assert ours["train"][key] == theirs["train"][key]


def test_second_machine_writes_only_events(workbench: Any, alone: Run) -> None:
    first, second = (without_dropout(workbench.run(name)) for name in ("m0", "m1"))
    assert work_together(workbench, [first, second]) == [0, 0]
    same_adapter(first, alone)
    assert values(second, "step", "loss") == values(first, "step", "loss")
    assert values(second, "exit", "code") == [0] and not values(second, "checkpoint", "step")
    assert not (second.path / "report.json").exists() and not second.adapter.exists()


def test_process_killed_in_training_fails_the_run_and_one_process_continues(
    workbench: Any, alone: Run
) -> None:
    first, second = (without_dropout(workbench.run(name)) for name in ("k0", "k1"))
    codes = work_together(workbench, [first, second], ("", "step-6"))
    assert codes == [exit_status.EXIT_REFUSED, -signal.SIGKILL]
    assert values(first, "error", "what")[0].startswith("Process 1 on machine 1")
    assert workbench.work(first) == 0
    steps = [e.step for e in first.events() if isinstance(e, Step) and e.attempt == 2]
    assert steps[0] == 5, "it continues from the checkpoint at step 4"
    same_adapter(first, alone)


def with_room(run: Run, model: Path, shards: int) -> Run:
    """Give the run the model, and just the memory that it needs with so many shards."""
    recipe = without_dropout(run).recipe()
    recipe.model = str(model)
    base, weights = BaseModelFiles("deep", model), WeightFormat("fp32")
    rows = pipeline.prepare_rows(recipe.data, pipeline.loading.load_tokenizer(base))
    workload = describe_workload(recipe, weights, base, rows)
    least = planner.least_memory(replace(workload, shards=shards), detect.detect_device())
    assert shards == 1 or least < planner.least_memory(workload, detect.detect_device())
    recipe.train.max_memory_gb = (least + 1) / 1e9
    write_atomic(run.path / "recipe.yaml", recipe.to_yaml())
    return run


def test_model_too_large_for_a_process_is_split_among_both(workbench: Any, deep_phi: Path) -> None:
    whole = with_room(workbench.run("whole"), deep_phi, shards=1)
    assert workbench.work(whole) == 0, (whole.path / "log.txt").read_text()
    run = with_room(workbench.run("split"), deep_phi, shards=2)
    assert work_together(workbench, [run, run]) == [0, 0], (run.path / "log.txt").read_text()
    plans = [read_json(one.path / "plan.json") for one in (whole, run)]
    assert [plan["shards"] for plan in plans] == [1, 2]
    for kind, key in (("step", "loss"), ("eval", "heldout_loss")):
        assert values(run, kind, key) == pytest.approx(values(whole, kind, key), abs=1e-5)
    same_adapter(run, whole)
    ours, theirs = (read_json(one.path / "report.json")["eval"]["after"] for one in (run, whole))
    assert [s["reply"] for s in ours["samples"]] == [s["reply"] for s in theirs["samples"]]


def test_machines_with_different_recipes_are_refused(workbench: Any) -> None:
    first = workbench.run("r0")
    second = without_dropout(workbench.run("r1"))
    assert work_together(workbench, [first, second]) == [exit_status.EXIT_REFUSED] * 2
    for run in (first, second):
        (what,) = values(run, "error", "what")
        assert "must train the same run; the recipe differs" in what
