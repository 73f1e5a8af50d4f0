"""Runs in real processes: whole ones on the tiny Phi, and light ones without training."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
import whole_worker

from jetson_ft.recipe import Recipe
from jetson_ft.runs import manager, store
from jetson_ft.runs.store import Run

# A worker process with a pipeline that doesn't train; everything around it is real. The run's name,
# or LIGHT_RUNS in the environment, says what it does. Python imports a module of this name
# (`sitecustomize`) when it starts.
LIGHT_PIPELINE = """
import os, sys

if "jetson_ft.runs.worker" in sys.orig_argv:
    import json, time, types
    from pathlib import Path
    if "late" in sys.orig_argv[-1]:
        time.sleep(1.5)  # before anything of this project runs
    from jetson_ft.errors import UserError

    def die_in_training(run, name):
        attempt = run.state().attempt
        if attempt > 1 and "always" not in name:
            return
        smaller = {"micro_batch_tokens": 256, "checkpointing": True,
                   "peak_memory_bytes": 10**9, "memory_limit_gb": 1.0}
        plan = {"micro_batch_tokens": 512, "checkpointing": False, "peak_memory_bytes": 2 * 10**9,
                "smaller": None if "smallest" in name else smaller}
        (run.path / "plan.json").write_text(json.dumps({**run.plan(), **plan}))
        from jetson_ft import events
        from jetson_ft.runs.event_log import EventLog
        log = EventLog(run, attempt)
        log.emit(events.PhaseStarted(name="model" if "loading" in name else "training", detail=""))
        if "loading" not in name:
            log.emit(events.Step(step=7, total_steps=9, loss=1.0, lr=1e-3, grad_norm=1.0, tokens=10,
                                 tokens_per_second=1.0, seconds_left=1.0, memory=10**9))
        group = os.environ.get("KILLING_GROUP")
        if group and "by-hand" not in name:
            Path(group, "cgroup.procs").write_text(str(os.getpid()))
            taken = []
            while True:
                taken.append(os.urandom(1 << 20))
        counter = os.environ.get("KILL_COUNTER")
        if counter and "by-hand" not in name:
            Path(counter).write_text("1")
        os.kill(os.getpid(), 9)

    def make_step(emit, number):
        from jetson_ft import events
        emit(events.PhaseStarted(name="training"))
        emit(events.Step(step=number, total_steps=9, loss=1.0, lr=1e-3, grad_norm=1.0,
                         tokens=10 * number, tokens_per_second=5000.0, seconds_left=1.0,
                         memory=10**9))

    class Pipeline:
        def __init__(self, run, emit, stop_requested, group):
            self.run, self.attempt, self.emit = run, run.state().attempt, emit
            self.stop_requested = stop_requested

        def finetune(self):
            name = self.run.name + os.environ.get("LIGHT_RUNS", "")
            (self.run.path / "pid").write_text(str(os.getpid()))
            (self.run.path / f"worked-{self.attempt}").write_text(repr(time.time()))
            if "refused" in name:
                raise UserError("No such file.", "rows.json", "Check the path.")
            if "faulty" in name:
                raise RuntimeError("boom")
            if "hungry" in name and (self.attempt == 1 or "always" in name):
                from jetson_ft.runs.oom import OutOfMemory
                raise OutOfMemory("Out of memory.", "here", "Less.", retry=True)
            if "killed" in name:
                die_in_training(self.run, name)
            if "hanging" in name and (self.attempt == 1 or "always" in name):
                import ctypes
                make_step(self.emit, 7)
                ctypes.PyDLL(None).sleep(60 if "always" in name else 4)  # without releasing the GIL
                make_step(self.emit, 8)
            if "crashing" in name:
                if "advancing" in name and self.attempt < 6:
                    (self.run.checkpoints / f"step-{self.attempt}").mkdir(parents=True)
                if "advancing" not in name or self.attempt < 6:
                    os.kill(os.getpid(), 11)
            is_endless = "endless" in name or "cut" in name and self.attempt == 1
            while is_endless and not self.stop_requested():
                time.sleep(0.02)
            return not self.stop_requested()

    module = types.ModuleType("jetson_ft.runs.pipeline")
    module.Pipeline = Pipeline
    sys.modules["jetson_ft.runs.pipeline"] = module

is_run = {"jetson_ft.runs.supervisor", "jetson_ft.runs.worker"} & set(sys.orig_argv)
if is_run and "HANG_SECONDS" in os.environ:
    from jetson_ft.runs import hang

    hang.STEP_SECONDS = hang._MARGIN_SECONDS = float(os.environ["HANG_SECONDS"])

if "jetson_ft.runs.supervisor" in sys.orig_argv and "KILL_COUNTER" in os.environ:
    from pathlib import Path
    from jetson_ft.hardware import cgroup

    cgroup.oom_kills = lambda _root: int(Path(os.environ["KILL_COUNTER"]).read_text())
"""


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Return the value of `condition` as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("the condition never became true")


def is_live(run: Run) -> bool:
    """Return whether a process of the run lives."""
    return run.is_locked("worker") or run.is_locked("supervisor")


class LightRuns:
    """Launches light runs in a folder and a queue of their own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "runs"

    def recipe(self, **train: Any) -> Recipe:
        """Return a recipe whose runs are made in the folder."""
        return Recipe.model_validate({"output_dir": str(self.root), "train": train})

    def launch(self, label: str, **train: Any) -> Run:
        """Launch a run; its label says what the worker does: endless, refused, faulty, or ends."""
        return manager.launch(self.recipe(**train), label)

    def wait(self, run: Run, *states: str, seconds: float = 15.0) -> str:
        """Wait until the run's reconciled state is one of these; return it."""
        state: str = wait_for(
            lambda: manager.reconcile_state(run) in states and run.state().state, seconds
        )
        return state

    def worker(self, run: Run) -> int:
        """Return the process number of the run's worker, once it works."""
        attempt = run.state().attempt
        wait_for(lambda: (run.path / f"worked-{attempt}").exists())
        return int((run.path / "pid").read_text())

    def until(self, condition: Callable[[], Any], seconds: float = 15.0) -> Any:
        """Return the value of `condition` as soon as it is true."""
        return wait_for(condition, seconds)

    def state_with_reason(self, run: Run) -> Any:
        """Return the state of a run once it has a reason."""
        return wait_for(lambda: run.state().reason and run.state())

    def supervisor(self, run: Run) -> psutil.Process:
        """Return the run's supervisor, a child of this process."""

        def find() -> psutil.Process | None:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    command = child.cmdline()
                    if "jetson_ft.runs.supervisor" in command and str(run.path) in command:
                        return child
            return None

        process: psutil.Process = wait_for(find)
        return process

    def kill_supervisor(self, run: Run) -> None:
        """Kill the run's supervisor once its worker works."""
        self.worker(run)
        supervisor = self.supervisor(run)
        supervisor.kill()
        supervisor.wait(5)

    def close(self) -> None:
        """End the runs that are still live."""
        runs = store.list_runs(self.root)
        for run in runs:
            run.request_stop()
        for run in runs:
            with contextlib.suppress(AssertionError):
                wait_for(lambda run=run: not is_live(run), 5.0)  # type: ignore[misc]


def change_children(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: bool = True
) -> None:
    """Run the code in every Python process that is started; give them a cache of their own."""
    site = Path(tempfile.mkdtemp(prefix="site-", dir=tmp_path))
    (site / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    if own_cache:
        monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def light_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LightRuns]:
    """Return real supervisors and workers with a light pipeline."""
    change_children(LIGHT_PIPELINE, tmp_path, monkeypatch)
    runs = LightRuns(tmp_path)
    yield runs
    runs.close()


# --- whole runs on the tiny Phi ----------------------------------------------------------------


class Workbench:
    """Runs whole worker processes: the real pipeline, without the wait for its imports."""

    def __init__(self, tiny_phi: Path, rows_file: Path, root: Path) -> None:
        self.context = forked.context()
        self.model, self.rows, self.root = tiny_phi, rows_file, root

    def run(self, label: str, rows: Path | None = None, **train: Any) -> Run:
        """Return a queued run of nine steps with dropout; `train` changes settings."""
        settings = {"epochs": 1.0, "tokens_per_step": 220, "learning_rate": 1e-2, "eval_every": 4}
        recipe = Recipe.model_validate(
            {
                "model": str(self.model), "precision": "fp32", "output_dir": str(self.root),
                "data": {"train": str(rows or self.rows), "heldout": 5},
                "lora": {"rank": 2, "dropout": 0.1}, "train": settings | train,
                "eval": {"max_new_tokens": 6, "samples": 2},
            }
        )  # fmt: skip
        run = store.create_run(recipe, label)
        run.write_state("queued")
        return run

    def work(self, run: Run, kill_at: str = "", **environment: str) -> int:
        """Run one attempt in a process, killed at an event if given; return its exit code."""
        if run.events():
            run.write_state("queued", attempt=run.state().attempt + 1)
        process = self.context.Process(
            target=whole_worker.work, args=(str(run.path), kill_at, environment)
        )
        process.start()
        process.join(60)
        code: int = process.exitcode
        return code


@pytest.fixture
def queued(light_runs: LightRuns) -> Callable[[str], Run]:
    """Return a function that makes a queued run without starting a worker."""

    def make(label: str) -> Run:
        run = store.create_run(light_runs.recipe(), label)
        run.write_state("queued")
        return run

    return make


@pytest.fixture(scope="session")
def workbench(
    tiny_phi: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workbench:
    """Return one for the session, so that the imports are done once."""
    return Workbench(tiny_phi, rows_file, tmp_path_factory.mktemp("whole-runs"))


@pytest.fixture(scope="session")
def finished(workbench: Workbench) -> Run:
    """Return an uninterrupted run; tests only read it."""
    run = workbench.run("uninterrupted")
    assert workbench.work(run, ALL_PROBES="1") == 0, (run.path / "log.txt").read_text()
    run.write_state("finished")
    return run
