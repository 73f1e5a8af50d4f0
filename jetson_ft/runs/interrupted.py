"""Runs that a power cut, a crash or a shutdown ended: take them up, or offer them to a person."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from jetson_ft.errors import Message, UserError
from jetson_ft.files import quoted
from jetson_ft.runs import manager, restarts
from jetson_ft.runs.exit_status import ExitStatus
from jetson_ft.runs.locks import lock
from jetson_ft.runs.processes import read_distributed_config
from jetson_ft.runs.store import Run

_TURN_SECONDS = 10.0  # for a supervisor to start
_MAX_OFFERED = 3  # the newest; others are in the list of runs


def take_up_runs(root: Path) -> list[str]:
    """Resume the interrupted runs under `root`, in the order of the queue.

    For the start of the page or of a service. Only runs with `run.auto_resume`, and at most
    `run.max_restarts` times in a row without a new checkpoint.

    Return a line for each run that was taken up or couldn't be, and for the newest of the others
    that can be resumed.
    """
    resumable = manager.resumable_runs(root)  # the newest first
    interrupted = [run for run in resumable if run.state().interrupted]
    lines, done = [], []
    for run in sorted(interrupted, key=lambda run: run.state().queued):
        try:
            if _take_up(run):
                done.append(run)
                lines.append(f"{run.name} was interrupted, and continues")
        except UserError as error:  # one run must not keep the others from their turn
            lines.append(f"{run.name} was interrupted, and can't continue: {error}")
    for run in [run for run in resumable if run not in done][:_MAX_OFFERED]:
        command = f"jetson-ft train --resume {quoted(run.name)}"
        lines.append(f"{run.name} can be resumed: Resume on the page, or {command}")
    return lines


def _take_up(run: Run) -> bool:
    """Resume an interrupted run if it may be restarted; return whether it may."""
    if read_distributed_config(run).nnodes > 1:  # the other machines must start with it
        return False
    state = run.state()
    reason = Message.from_json(state.message) if state.message else Message(state.reason)
    old = ExitStatus(state.state, reason, state.resumable, state.interrupted)
    number, new = restarts.next_restart(run, old)
    if number:
        manager.resume(run, restarts=number)
        with suppress(UserError):  # the disk is full, which ends the run with a message of its own
            restarts.record(run, reason)
        _wait_for_place(run)
    elif new != old and (lock_file := lock(run.path / "supervisor.lock")):
        with lock_file:
            run.write_state(*new)
    return number is not None


def _wait_for_place(run: Run) -> None:
    """Wait until the run's supervisor has its place in the queue, before the next one's."""
    deadline = time.monotonic() + _TURN_SECONDS
    while time.monotonic() < deadline and manager.reconcile_state(run) == "queued":
        if run.state().reason:  # another run is training
            return
        time.sleep(0.02)
