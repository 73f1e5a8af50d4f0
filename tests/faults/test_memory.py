"""Memory that runs out: raised, killed by the kernel, limited by a control group."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.runs import exit_status, manager, store
from jetson_ft.runs.processes import DistributedConfig
from jetson_ft.runs.store import Run

MEMORY_GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMIT = 160 << 20  # a light worker has 60 MB


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the kernel kill the worker, in a real control group with a low limit."""
    for base in MEMORY_GROUPS:
        group = base / f"jetson-ft-{os.getpid()}"
        names = ("memory.limit_in_bytes", "memory.max")
        try:
            group.mkdir()
            (limit,) = (group / name for name in names if (group / name).exists())
            limit.write_text(str(LIMIT))
        except (OSError, ValueError):
            if group.exists():
                group.rmdir()
            continue
        monkeypatch.setenv("KILLING_GROUP", str(group))
        yield
        group.rmdir()
        return
    pytest.skip("a control group can only be made by root")


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
