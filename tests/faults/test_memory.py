"""Memory that runs out: raised, killed by the kernel, limited by a control group."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import program
import psutil
import pytest

from jetson_ft.chat.client import ChatClient, ChatRequest
from jetson_ft.data.lengths import KNOWN_LENGTHS
from jetson_ft.errors import UserError
from jetson_ft.files import write_json
from jetson_ft.hardware.detect import Device
from jetson_ft.inference.generate import Sampling
from jetson_ft.models.catalog import KNOWN_DIMS
from jetson_ft.models.loading import WeightFormat
from jetson_ft.recipe import LoraRecipe, Recipe, TrainRecipe
from jetson_ft.runs import exit_status, manager, store
from jetson_ft.runs.processes import DistributedConfig
from jetson_ft.runs.queue import QueueTicket
from jetson_ft.runs.store import Run
from jetson_ft.training import planner
from jetson_ft.training.cost_model import Workload

MEMORY_GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMIT = 160 << 20  # a light worker has 60 MB


@contextmanager
def control_group(size: int) -> Iterator[Path]:
    """Yield the folder of a real control group whose processes have so much memory."""
    for base in MEMORY_GROUPS:
        group = base / f"jetson-ft-{os.getpid()}"
        names = ("memory.limit_in_bytes", "memory.max")
        try:
            group.mkdir()
            (limit,) = (group / name for name in names if (group / name).exists())
            limit.write_text(str(size))
        except (OSError, ValueError):
            if group.exists():
                group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    pytest.skip("a control group can only be made by root")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the kernel kill the worker."""
    with control_group(LIMIT) as group:
        monkeypatch.setenv("KILLING_GROUP", str(group))
        yield


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernel's counter of kills; the worker increases it and kills itself."""
    path = tmp_path / "kills"
    path.write_text("0")
    monkeypatch.setenv("KILL_COUNTER", str(path))


def ended(light_runs: Any, label: str, **train: Any) -> Run:
    run: Run = light_runs.launch(label, **train)
    light_runs.wait(run, *store.ENDED_STATES)
    return run


def check_advice(run: Run) -> None:
    """The error names the cause, the step and the command that takes less memory."""
    assert run.state().state == "failed"
    assert "the kernel ended the process" in run.state().reason
    error = exit_status.last_error(run)
    assert "micro-batches of 512 tokens and activations kept" in str(error.what)
    assert "training" in str(error.where) and "step 7" in str(error.where)
    (command,) = re.findall(r"`(jetson-ft train [^`]+)`", str(error.fix))
    *_, resumed, _, override = shlex.split(command)
    assert Path(resumed) == run.path and override == "train.max_memory_gb=1"


@pytest.mark.promise(61)
@pytest.mark.promise(9)
@pytest.mark.usefixtures("kernel")
def test_worker_killed_by_the_kernel_gets_advice(light_runs: Any) -> None:
    check_advice(ended(light_runs, "killed"))


@pytest.mark.promise(61)
@pytest.mark.usefixtures("kernel")
def test_killed_worker_is_started_once_more_with_less(light_runs: Any) -> None:
    run = ended(light_runs, "killed", on_oom="shrink")
    assert (run.state().state, run.state().attempt) == ("finished", 2)
    assert run.plan()["memory_limit_gb"] == 1.0
    run = ended(light_runs, "always-killed", on_oom="shrink")
    assert (run.state().state, run.state().attempt) == ("failed", 2), "no blind retry"
    assert "kernel" in run.state().reason


@pytest.mark.promise(61)
@pytest.mark.usefixtures("counter")
def test_counter_of_kills_decides(light_runs: Any) -> None:
    """As above, without rights to make a control group."""
    check_advice(ended(light_runs, "killed"))
    run = ended(light_runs, "killed-by-hand", on_oom="shrink")
    assert (run.state().state, run.state().reason) == ("failed", "crashed (signal 9)")
    assert run.state().attempt == 1 and "memory_limit_gb" not in run.plan()


@pytest.mark.promise(9)
@pytest.mark.usefixtures("counter")
def test_advice_fits_the_place(light_runs: Any) -> None:
    error = exit_status.last_error(ended(light_runs, "killed-loading", on_oom="shrink"))
    assert "model" in str(error.where) and "quantize: nf4" in str(error.fix)
    assert "max_memory_gb" not in str(error.fix), "a smaller plan loads the same weights"


@pytest.mark.promise(9)
@pytest.mark.usefixtures("counter")
def test_smallest_plan_has_other_advice(light_runs: Any) -> None:
    error = exit_status.last_error(ended(light_runs, "killed-smallest", on_oom="shrink"))
    assert "No plan takes less" in str(error.fix)


@pytest.mark.promise(61)
@pytest.mark.slow(minutes=0.2)
@pytest.mark.usefixtures("kernel")
def test_one_of_several_workers_killed_by_the_kernel_gets_advice(light_runs: Any) -> None:
    config = DistributedConfig(nproc_per_node=2)
    run = manager.launch(light_runs.recipe(on_oom="shrink"), "killed", config)
    light_runs.wait(run, *store.ENDED_STATES, seconds=60.0)
    assert run.state().attempt == 1
    check_advice(run)


# --- limits of control groups --------------------------------------------------------------------

IN_GROUP = "open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))"
MAIN = "from jetson_ft.cli import main; sys.argv[1:] = sys.argv[2:]; main()"


def in_group(group: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `jetson-ft` in a control group."""
    code = f"import os, sys; {IN_GROUP}; {MAIN}"
    return subprocess.run(
        [sys.executable, "-c", code, str(group), *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


HOLD = "held = b'x' * (500 << 20); print(1, flush=True); input()"


def planned_free(plan: subprocess.CompletedProcess[str]) -> float:
    """Return the GiB that are free on this machine by the plan."""
    (here,) = (line for line in plan.stdout.splitlines() if line.startswith("this machine "))
    return float(here.split()[6])


@pytest.mark.promise(62)
def test_limit_of_a_control_group_is_the_machines_memory() -> None:
    with control_group(1200 << 20) as group:
        alone = in_group(group, "plan", "quickstart-zh")
        with subprocess.Popen(
            [sys.executable, "-c", f"import os, sys; {IN_GROUP}; {HOLD}", str(group)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as other:  # fmt: skip
            assert other.stdout and other.stdout.readline()
            beside_another = in_group(group, "plan", "quickstart-zh")
            other.communicate(b"\n")
    assert 0.8 < planned_free(alone) <= 1.2, alone.stdout
    assert 0.3 < planned_free(beside_another) < 1.1, beside_another.stdout
    assert "limit of this container or service" in alone.stdout


@pytest.mark.promise(62)
def test_refusal_names_the_limit_of_the_control_group() -> None:
    device = Device("cpu", "a processor", None, 2, 10**9, 10**9, False, False, memory_limited=True)
    workload = Workload(
        KNOWN_DIMS["microsoft/phi-1_5"], WeightFormat("bf16"), LoraRecipe(), TrainRecipe(),
        KNOWN_LENGTHS["llamafactory/alpaca_zh", "microsoft/phi-1_5"], 1000.0,
    )  # fmt: skip
    free = r"0\.93 GiB are free of the 0\.93 GiB of this container or service"
    with pytest.raises(UserError, match=free):
        planner.choose_plan(workload, device, 1e12)


# --- a chat beside a run -------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return a function that lets a run train, as the lock of the machine's slot shows it."""
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))

    @contextmanager
    def train() -> Iterator[None]:
        run = store.create_run(Recipe(output_dir=str(tmp_path / "runs")), "beside")
        run.write_state("running")
        parts = {"process": 0, "context": 0}
        peak = psutil.virtual_memory().total  # which it hasn't allocated yet
        write_json(run.path / "plan.json", {"peak_memory_bytes": peak, "parts": parts})
        slot = QueueTicket(1.0).try_take(run.path)
        assert slot
        with slot:
            yield

    return train


@pytest.mark.promise(37)
def test_chat_that_does_not_fit_beside_a_run_is_busy(
    training: Any, tiny_phi: Path, tmp_path: Path
) -> None:
    with training():
        done = program.run("chat", str(tiny_phi), cwd=tmp_path)
    program.assert_refused(done, "Busy: a run is training", "Wait for its end")


@pytest.mark.promise(37)
@pytest.mark.slow(minutes=0.2)
def test_loaded_chat_makes_room_for_a_run(training: Any, tiny_phi: Path, tmp_path: Path) -> None:
    client = ChatClient(tmp_path / "runs")
    request = ChatRequest("1", [], Sampling(max_new_tokens=2))
    try:
        assert list(client.generate(str(tiny_phi), request))
        process: Any = client._process
        with training():
            assert process.wait(10) is not None, "the model is unloaded"
            with pytest.raises(UserError, match=r"unloaded|Busy"):
                list(client.generate(str(tiny_phi), request))
        assert list(client.generate(str(tiny_phi), request))
    finally:
        client.close()
