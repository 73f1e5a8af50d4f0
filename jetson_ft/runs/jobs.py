"""Starting, resuming, stopping and queueing runs.

Each run has a small supervisor process, detached from whoever launched it. It waits until
the machine is free, starts the worker, and records how the worker ended. One run trains at
a time: the slot is a lock file, handed on to the worker, so that it stays taken even if the
supervisor is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from jetson_ft import recipe as recipes
from jetson_ft.errors import UserError
from jetson_ft.paths import cache_dir, disk_errors, write_atomic
from jetson_ft.recipe import Recipe
from jetson_ft.runs import rundir
from jetson_ft.runs.rundir import ENDED, LIVE, Run, lock

# What may change on resume, and only upwards: how long a run is.
_LENGTH_KEYS = {"train.epochs", "train.max_steps", "train.max_minutes"}


def launch(recipe: Recipe, label: str) -> Run:
    """Makes the run and starts its supervisor; returns at once."""
    run = rundir.create(_with_absolute_paths(recipe), label)
    run.write_state("queued")
    _spawn_supervisor(run)
    return run


def resume(run: Run, overrides: Iterable[str] = ()) -> Run:
    """Goes on from the last checkpoint; overrides may only make the run longer.

    Raises:
        UserError: it is running, it is finished, or an override would change what it learns.
    """
    settle(run)
    if run.is_live():
        raise UserError(f"{run.name} is running already.", str(run.path), "`jetson-ft runs list`")
    old = run.recipe()
    new = recipes.parse(old.to_yaml(), str(run.path / "recipe.yaml"), overrides)
    _check_only_longer(run, old, new)
    state = run.state()
    if state.state == "finished" and new == old:
        raise UserError(
            f"{run.name} is finished.",
            str(run.path),
            "Make it longer (--set train.epochs=…), or start a new run.",
        )
    if new != old:
        write_atomic(run.path / "recipe.yaml", new.to_yaml())
    run.clear_stop()
    run.write_state("queued", attempt=state.attempt + 1)
    _spawn_supervisor(run)
    return run


def _check_only_longer(run: Run, old: Recipe, new: Recipe) -> None:
    changes = old.diff(new)
    foreign = {key: pair for key, pair in changes.items() if key not in _LENGTH_KEYS}
    if foreign:
        listed = ", ".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in foreign.items())
        raise UserError(
            f"A resumed run must learn the same thing; this would change {listed}.",
            str(run.path),
            "Resume without it, or start a new run with it.",
        )
    for key, (before, after) in changes.items():
        unlimited = key != "train.epochs" and after == 0
        if not unlimited and after < before:
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


def _spawn_supervisor(run: Run) -> None:
    command = [sys.executable, "-m", "jetson_ft.runs.supervisor", str(run.path)]
    with disk_errors(run.path), open(run.path / "log.txt", "ab") as log:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _wait_for_supervisor(run)


def _wait_for_supervisor(run: Run, seconds: float = 20.0) -> None:
    """Returns once the new process holds its lock, so that nobody takes the run for dead."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if run.is_locked("supervisor") or run.state().state in ENDED:
            return
        time.sleep(0.02)
    raise UserError(
        "The run's supervisor did not start.", str(run.path / "log.txt"), "Look into that file."
    )


def stop(run: Run) -> None:
    """Asks for a checkpoint and an end. Harmless when the run has ended."""
    if settle(run) in LIVE:
        run.request_stop()


def settle(run: Run) -> str:
    """The run's state, corrected where its processes died without a word (a power cut)."""
    state = run.state()
    if state.state not in LIVE or run.is_live():
        return state.state
    held = lock(run.path / "supervisor.lock")
    if held is None:  # somebody took it over just now
        return run.state().state
    with held:
        run.write_state("failed", "ended without a word (power cut, or killed); resumable")
    return "failed"


class Slot:
    """The machine's place for one running job, first come first served.

    Who waits holds the lock of a ticket file named by time; the oldest living ticket may
    try for the slot.
    """

    def __init__(self) -> None:
        self._folder = cache_dir("queue")
        self._name = f"{time.time_ns():020d}-{os.getpid()}"
        self._ticket = lock(self._folder / self._name)

    def try_take(self) -> IO[bytes] | None:
        """The slot's lock file when it is this ticket's turn and the slot is free."""
        if self._is_anybody_before():
            return None
        held = lock(self._folder / "slot")
        if held:
            self.leave()
        return held

    def leave(self) -> None:
        """Gives the ticket back."""
        (self._folder / self._name).unlink(missing_ok=True)
        if self._ticket:
            self._ticket.close()
            self._ticket = None

    def _is_anybody_before(self) -> bool:
        for path in sorted(self._folder.glob("[0-9]*-*")):
            if path.name >= self._name:
                return False
            try:
                with open(path, "rb") as file:
                    if not rundir.try_lock(file):
                        return True
            except FileNotFoundError:
                continue
            path.unlink(missing_ok=True)  # its owner died waiting
        return False
