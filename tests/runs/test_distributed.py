"""Runs of several processes: the launcher's life, and who writes what."""

from __future__ import annotations

import json
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import whole_worker

from jetson_ft.device import probe
from jetson_ft.errors import UserError
from jetson_ft.models.load import Weights
from jetson_ft.models.resolve import Base
from jetson_ft.paths import read_json, write_atomic
from jetson_ft.runs import ending, jobs, launcher, pipeline, processes, rundir
from jetson_ft.runs.processes import Processes
from jetson_ft.runs.rundir import Run
from jetson_ft.training import checkpoint, planner

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- what is asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nproc_per_node": 0}, "At least one process"),
        ({"nnodes": 2, "node_rank": 2, "rendezvous": "a:1"}, "There is no machine 2 among 2"),
        ({"node_rank": 1}, "There is no machine 1 among 1"),
        ({"nnodes": 2}, "need a place to meet"),
        ({"nnodes": 2, "rendezvous": "10.0.0.1"}, "need a place to meet"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Processes().changed(**asked)


def test_a_resumed_run_keeps_its_processes_or_takes_new_ones(shop: Any) -> None:
    old = Processes(nnodes=2, node_rank=0, rendezvous="10.0.0.1:29500")
    run = rundir.create(shop.recipe(), "plain")
    run.write_state("stopped")
    processes.store(run, old)
    assert processes.of(run) == old and processes.of(run).several
    alone = processes.of(run).changed(nnodes=1, nproc_per_node=None)
    assert not alone.several
    jobs.resume(run, wanted=alone)
    assert shop.wait(run, *rundir.ENDED) == "finished"
    assert not processes.of(run).several


def test_the_interface_is_the_one_that_leads_to_the_others() -> None:
    assert launcher._interface(processes.own_address("127.0.0.1")) in ("lo", "lo0")


# --- the launcher, with light workers ---------------------------------------------------------


def ranks(run: Run) -> dict[int, psutil.Process]:
    """The run's processes by their number."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][1:] == [
            "-m", "jetson_ft.runs.worker", str(run.path),
        ]:  # fmt: skip
            found[int(process.environ()["RANK"])] = process
    return found


@pytest.fixture
def pair(shop: Any) -> Any:
    """Launches a light run of two processes, and waits until they work."""

    def launch(label: str) -> Run:
        run = jobs.launch(shop.recipe(), label, Processes(nproc_per_node=2))
        shop.until(lambda: (run.path / "worked-1").exists(), 90.0)
        return run

    return launch


def test_two_processes_end_finished(shop: Any, pair: Any) -> None:
    run = pair("plain")
    assert shop.wait(run, *rundir.ENDED, seconds=60.0) == "finished"
    assert [e["kind"] for e in run.events()] == ["end"]


def test_two_processes_stop_when_asked(shop: Any, pair: Any) -> None:
    run = pair("endless")
    jobs.stop(run)
    assert shop.wait(run, *rundir.ENDED, seconds=60.0) == "stopped"


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_fails_the_run_and_is_named(shop: Any, pair: Any, number: int) -> None:
    run = pair("endless")
    ranks(run)[number].kill()
    assert shop.wait(run, *rundir.ENDED, seconds=60.0) == "failed"
    assert run.state().reason.startswith(f"Process {number} on machine 0")
    (error,) = [e for e in run.events() if e["kind"] == "error"]
    assert error["where"] == f"ended by signal {signal.SIGKILL.value}"
    assert "--resume RUN" in error["fix"] and not ranks(run)


def test_a_refused_run_says_why_once(shop: Any, pair: Any) -> None:
    run = pair("refused")
    assert shop.wait(run, *rundir.ENDED, seconds=60.0) == "failed"
    assert [e["what"] for e in run.events() if e["kind"] == "error"] == ["No such file."]


def test_the_wait_for_another_machine_can_be_stopped(shop: Any) -> None:
    port = free_port()
    wanted = Processes(nnodes=2, rendezvous=f"127.0.0.1:{port}")
    run = jobs.launch(shop.recipe(), "plain", wanted)
    shop.until(lambda: listens(port), 60.0)
    jobs.stop(run)
    assert shop.wait(run, *rundir.ENDED) == "stopped"


# --- whole runs -------------------------------------------------------------------------------


def without_dropout(run: Run, **train: Any) -> Run:
    """Each process drops out others: only without can several equal one."""
    recipe = run.recipe()
    recipe.lora.dropout = 0.0
    for key, value in train.items():
        setattr(recipe.train, key, value)
    write_atomic(run.path / "recipe.yaml", recipe.to_yaml())
    return run


def work_together(workbench: Any, runs: list[Run], kill_at: tuple[str, ...] = ("", "")) -> Any:
    """One process for each entry, on a machine of its own where the folder is; exit codes."""
    port, started = free_port(), []
    for rank, run in enumerate(runs):
        local = rank - runs.index(run)
        place = {
            "RANK": rank, "WORLD_SIZE": len(runs), "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": runs.count(run), "GROUP_RANK": rank - local,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            "JETSON_FT_PATIENCE": 4, "GLOO_SOCKET_IFNAME": "lo",
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


def of(run: Run, kind: str, key: str) -> list[Any]:
    return [event[key] for event in run.events() if event["kind"] == kind]


def weights(run: Run) -> dict[str, Any]:
    return checkpoint.load_tensors(run.adapter / "adapter_model.safetensors")


def same_adapter(run: Run, other: Run) -> None:
    found = weights(other)
    distance = max(float((v - found[name]).abs().max()) for name, v in weights(run).items())
    assert distance < 1e-5


def test_two_processes_make_one_processs_run(workbench: Any, alone: Run) -> None:
    run = without_dropout(workbench.run("two"))
    assert work_together(workbench, [run, run]) == [0, 0], (run.path / "log.txt").read_text()
    for kind, key in (("step", "loss"), ("eval", "heldout_loss"), ("eval", "bits_per_char")):
        assert of(run, kind, key) == pytest.approx(of(alone, kind, key), abs=1e-5)
    same_adapter(run, alone)
    lines = [json.loads(line)["kind"] for line in run.events_file.read_text().splitlines()]
    assert lines.count("step") == len(of(alone, "step", "loss")) and lines.count("end") == 1
    (told,) = [e for e in run.events() if e["kind"] == "processes"]
    assert (told["size"], told["rank"], told["backend"]) == (2, 0, "gloo")
    ours, theirs = (read_json(r.path / "report.json") for r in (run, alone))
    for key in ("steps", "rows", "tokens", "supervised_tokens"):
        assert ours["train"][key] == theirs["train"][key]


def test_the_second_machine_keeps_no_more_than_its_events(workbench: Any, alone: Run) -> None:
    first, second = (without_dropout(workbench.run(name)) for name in ("m0", "m1"))
    assert work_together(workbench, [first, second]) == [0, 0]
    same_adapter(first, alone)
    assert of(second, "step", "loss") == of(first, "step", "loss")
    assert of(second, "end", "code") == [0] and not of(second, "checkpoint", "step")
    assert not (second.path / "report.json").exists() and not second.adapter.exists()


def test_a_process_killed_in_training_fails_the_run_and_one_alone_goes_on(
    workbench: Any, alone: Run
) -> None:
    first, second = (without_dropout(workbench.run(name)) for name in ("k0", "k1"))
    codes = work_together(workbench, [first, second], ("", "step-6"))
    assert codes == [ending.EXIT_REFUSED, -signal.SIGKILL]
    assert of(first, "error", "what")[0].startswith("Process 1 on machine 1")
    assert workbench.work(first) == 0
    steps = [e["step"] for e in first.events() if e["kind"] == "step" and e["attempt"] == 2]
    assert steps[0] == 5, "it goes on from the checkpoint at step 4"
    same_adapter(first, alone)


def with_room(run: Run, model: Path, shards: int) -> Run:
    """The run with that model, and just the memory that it takes where the layers are split so."""
    recipe = without_dropout(run).recipe()
    recipe.model = str(model)
    base, weights = Base("deep", model), Weights("fp32")
    work = pipeline.work_of(recipe, weights, base, pipeline.prepare_rows(recipe, base))
    least = planner.least_memory(replace(work, shards=shards), probe.probe())
    assert shards == 1 or least < planner.least_memory(work, probe.probe())
    recipe.train.max_memory_gb = (least + 1) / 1e9
    write_atomic(run.path / "recipe.yaml", recipe.to_yaml())
    return run


def test_a_model_that_fits_into_no_process_is_split_among_both(
    workbench: Any, deep_phi: Path
) -> None:
    whole = with_room(workbench.run("whole"), deep_phi, shards=1)
    assert workbench.work(whole) == 0, (whole.path / "log.txt").read_text()
    run = with_room(workbench.run("split"), deep_phi, shards=2)
    assert work_together(workbench, [run, run]) == [0, 0], (run.path / "log.txt").read_text()
    plans = [read_json(one.path / "plan.json") for one in (whole, run)]
    assert [plan["shards"] for plan in plans] == [1, 2]
    for kind, key in (("step", "loss"), ("eval", "heldout_loss")):
        assert of(run, kind, key) == pytest.approx(of(whole, kind, key), abs=1e-5)
    same_adapter(run, whole)
    ours, theirs = (read_json(one.path / "report.json")["eval"]["after"] for one in (run, whole))
    assert [s["reply"] for s in ours["samples"]] == [s["reply"] for s in theirs["samples"]]


def test_machines_with_different_recipes_refuse_to_train_together(workbench: Any) -> None:
    first = workbench.run("r0")
    second = without_dropout(workbench.run("r1"))
    assert work_together(workbench, [first, second]) == [ending.EXIT_REFUSED] * 2
    for run in (first, second):
        (what,) = of(run, "error", "what")
        assert "must learn the same thing; the recipe differs" in what
