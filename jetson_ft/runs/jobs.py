"""Starting, resuming, stopping and queueing runs.

Each run has a small supervisor process, detached from whoever launched it. It waits until
the machine is free, starts the worker, and records how the worker ended. One run trains at
a time: the slot is a lock file, handed on to the worker, so that it stays taken even if the
supervisor is killed.

Who changes a run's state holds `supervisor.lock`: first the launcher, which hands it to the
supervisor it starts; after both are dead, whoever settles or resumes the run.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from jetson_ft import recipe as recipes
from jetson_ft.errors import UserError
from jetson_ft.paths import disk_errors, write_atomic
from jetson_ft.recipe import Recipe
from jetson_ft.runs import ending, preflight, processes, rundir
from jetson_ft.runs.processes import Processes
from jetson_ft.runs.rundir import LIVE, Run, lock

# What may change on resume, and only upwards: how long a run is.
_LENGTH_KEYS = {"train.epochs", "train.max_steps", "train.max_minutes"}
# What changes how and when a step is computed, and not what is learnt.
_PLAN_KEYS = {"train.max_memory_gb", "train.on_oom", "device.max_temperature_c"}
_ONE = Processes()


def launch(recipe: Recipe, label: str, wanted: Processes = _ONE) -> Run:
    """Makes the run and starts its supervisor; returns at once.

    Raises:
        UserError: the job would fail at its start, or its folder can't be written; nothing
            of it is left behind.
    """
    preflight.check(recipe)
    run = rundir.create(_with_absolute_paths(recipe), label)
    try:
        with _claim(run) as held:
            processes.store(run, wanted)
            run.write_state("queued")
            _spawn_supervisor(run, held)
    except UserError:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def resume(run: Run, overrides: Iterable[str] = (), wanted: Processes | None = None) -> Run:
    """Goes on from the last checkpoint; overrides may only make the run longer.

    As many processes work on it as before, or as are wanted now.

    Raises:
        UserError: it is running, it is finished, or an override would change what it learns.
    """
    if settle(run) in LIVE:
        raise _running_already(run)
    with _claim(run) as held:
        old, state = run.recipe(), run.state()
        new = recipes.parse(old.to_yaml(), str(run.path / "recipe.yaml"), overrides)
        check_only_longer(run, old, new)
        if state.state == "finished" and new == old:
            raise UserError(
                f"{run.name} is finished.",
                str(run.path),
                "Make it longer (--set train.epochs=…), or start a new run.",
            )
        if new != old:
            write_atomic(run.path / "recipe.yaml", new.to_yaml())
        if wanted:
            processes.store(run, wanted)
        run.clear_stop()
        run.write_state("queued", attempt=state.attempt + 1)
        _spawn_supervisor(run, held)
    return run


def _claim(run: Run) -> IO[bytes]:
    """The lock without which nobody may change a run's state."""
    # An ended run's supervisor has still to leave, which takes a moment.
    held = lock(run.path / "supervisor.lock", patience=2.0)
    if held is None:
        raise _running_already(run)
    if run.is_locked("worker"):
        held.close()
        raise _running_already(run)
    return held


def _running_already(run: Run) -> UserError:
    return UserError(
        f"{run.name} is running already.", str(run.path), "`jetson-ft runs stop` ends it."
    )


def check_only_longer(run: Run, old: Recipe, new: Recipe) -> None:
    """Refuses a recipe under which a resumed run would learn something else, or less."""
    changes = {key: pair for key, pair in old.diff(new).items() if key not in _PLAN_KEYS}
    foreign = {key: pair for key, pair in changes.items() if key not in _LENGTH_KEYS}
    if foreign:
        listed = ", ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in foreign.items())
        raise UserError(
            f"A resumed run must learn the same thing; this would change {listed}.",
            str(run.path),
            "Resume without it, or start a new run with it.",
        )
    for key, (before, after) in changes.items():
        # Of steps and minutes, 0 means no limit.
        if (after or math.inf) < (before or math.inf):
            raise UserError(
                f"A resumed run can only become longer; {key} would fall from {before} to {after}.",
                str(run.path),
                "`jetson-ft runs stop` ends a run early.",
            )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """So that the run can be resumed from anywhere."""
    copy = recipe.model_copy(deep=True)
    copy.output = str(Path(recipe.output).expanduser().absolute())
    for section, key in ((copy, "model"), (copy.data, "train"), (copy.data, "heldout")):
        value = getattr(section, key)
        if isinstance(value, str) and value not in ("embedded", "bundled", "auto"):
            path = Path(value).expanduser()
            if path.exists():
                setattr(section, key, str(path.absolute()))
    return copy


def _spawn_supervisor(run: Run, held: IO[bytes]) -> None:
    """Starts it as the new owner of the lock, so that nobody takes the run for dead meanwhile."""
    number = held.fileno()
    command = [sys.executable, "-m", "jetson_ft.runs.supervisor", str(run.path), str(number)]
    with disk_errors(run.path), open(run.path / "log.txt", "ab") as log:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=[number], start_new_session=True,
        )  # fmt: skip


def stop(run: Run) -> None:
    """Asks for a checkpoint and an end. Harmless when the run has ended."""
    if settle(run) in LIVE:
        run.request_stop()


def settle(run: Run) -> str:
    """The run's state, corrected where its processes died without a word (a power cut)."""
    state = run.state().state
    if state not in LIVE or run.is_live():
        return state
    held = lock(run.path / "supervisor.lock")
    if held is None:  # somebody took it over just now
        return run.state().state
    with held:
        # Read again: it may have ended properly between the first look and the lock.
        if run.state().state in LIVE and not run.is_locked("worker"):
            run.write_state(*ending.unwatched(run))
        return run.state().state


def resumable(root: Path) -> list[Run]:
    """Runs under the root that were cut short, by whom or what ever; newest first."""
    found = []
    for run in rundir.list_runs(root):
        with suppress(UserError):  # a damaged one
            if settle(run) not in LIVE and run.state().reason.endswith(ending.RESUMABLE):
                found.append(run)
    return found
