"""The small process beside each run: waits for its turn, starts the worker, records its end.

Run as `python -m jetson_ft.runs.supervisor RUN LOCK`; LOCK is the number of the open, locked file
that the command hands over. It imports no torch.

The supervisor takes `worker.lock` before the worker exists and hands it over in the same way, so
that at no moment a worker lives without it, whenever the supervisor is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from jetson_ft import logs
from jetson_ft.child_process import python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import DiskFull
from jetson_ft.runs import exit_status, hang, oom, restarts
from jetson_ft.runs.exit_status import ExitStatus
from jetson_ft.runs.locks import lock
from jetson_ft.runs.processes import WORKER_ENVIRONMENT, read_distributed_config, stop_on_sigterm
from jetson_ft.runs.queue import QueueTicket
from jetson_ft.runs.store import Run, RunRemoved

_POLL_SECONDS = 0.25
_RECORD_SECONDS = 5.0  # to write the last state on a full disk
# Takes the run, and the open files that lock it and the machine's slot; returns the exit code.
RunAttempt = Callable[[Run, list[IO[bytes]]], int]


def supervise(run: Run, lock_file: IO[bytes], run_attempt: RunAttempt | None = None) -> None:
    """Wait for the slot, run the worker (again where `_run_attempts` says so), record the state.

    A run whose folder is removed meanwhile ends without a record.

    Args:
        lock_file: the run's locked `supervisor.lock`.
        run_attempt: makes one attempt; by default in a worker process.
    """
    stop_on_sigterm(run)  # the worker obeys; this process stays to record the result
    with lock_file, suppress(RunRemoved):
        try:
            slot = _wait_for_turn(run)
            if slot is None:
                message = Message(_("stopped while waiting in the queue; resumable"))
                status = exit_status.stopped(run, message)
            else:
                with slot:
                    status = _run_attempts(run, slot, run_attempt or _run_worker)
        except RunRemoved:
            raise
        except UserError as error:  # before an attempt: the run's disk, or the queue's folder
            status = ExitStatus("failed", error.what, resumable=isinstance(error, DiskFull))
        run.release_space()
        run.clear_stop()  # first, so that no reader sees an ended run with a request to stop
        _record(run, status)


def _record(run: Run, status: ExitStatus) -> None:
    """Write the state; while the disk is full, try again for a while.

    After that `manager.reconcile_state` derives the state, as after a supervisor's death.
    """
    deadline = time.monotonic() + _RECORD_SECONDS
    while True:
        try:
            return run.write_state(*status)
        except DiskFull:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _try_to_write_state(run: Run, state: str, message: Message | None = None) -> None:
    """Write a state that is soon replaced; do nothing if the disk is full."""
    with suppress(DiskFull):
        run.write_state(state, message)


def _wait_for_turn(run: Run) -> IO[bytes] | None:
    """Return the slot's lock file; None: the run was asked to stop before its turn."""
    ticket = QueueTicket(since=run.state_or_derived().updated)
    try:
        while not run.stop_requested():
            if slot := ticket.try_take(run.path):
                return slot
            if not run.state_or_derived().reason:
                message = Message(_("another run is training; this one starts after it"))
                _try_to_write_state(run, "queued", message)
            time.sleep(_POLL_SECONDS)
    finally:
        ticket.cancel()
    return None


def _run_attempts(run: Run, slot: IO[bytes], run_attempt: RunAttempt) -> ExitStatus:
    """Run the worker: again after `EXIT_RETRY`, once, and after crashes (`run.auto_resume`).

    Return the state to record.
    """
    lock_file = lock(run.path / "worker.lock", timeout=1.0)
    if lock_file is None:  # a worker of a supervisor that was killed
        return exit_status.state_for_exit_code(run, exit_status.EXIT_FAILED)
    may_retry = True
    with lock_file:
        while True:
            code = run_attempt(run, [slot, lock_file])
            attempt = run.state_or_derived().attempt + 1
            if code == exit_status.EXIT_RETRY and run.stop_requested():
                code = exit_status.EXIT_STOPPED
            elif code == exit_status.EXIT_RETRY and may_retry:
                may_retry = False
                run.write_state("running", attempt=attempt)
                continue
            status = exit_status.state_for_exit_code(run, code)
            if run.stop_requested():
                return status
            number, status = restarts.next_restart(run, status)
            if number is None:
                return status
            step = restarts.newest_step(run)
            run.write_state("running", attempt=attempt, restarts=number, restart_step=step)
            with suppress(UserError):  # the disk is full, or a file is damaged
                restarts.record(run, status.message)


def _run_worker(run: Run, locks: list[IO[bytes]]) -> int:
    """Run an attempt in a process of its own, which inherits the locks; return its exit code.

    A worker that hangs is ended if the run is restarted by itself, or is asked to stop.
    """
    program = "launcher" if read_distributed_config(run).needs_launcher else "worker"
    command = python_module(f"jetson_ft.runs.{program}", str(run.path))
    kill_watch, hang_watch, was_ended = oom.KillWatch(), hang.HangWatch(run), False
    with run.open_log() as log:
        worker = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=[file.fileno() for file in locks], env={**WORKER_ENVIRONMENT, **os.environ},
        )  # fmt: skip
    _try_to_write_state(run, "running")
    while True:
        try:
            code = worker.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            kill_watch.update()
            try:
                if run.stop_requested() and run.state_or_derived().state != "stopping":
                    _try_to_write_state(run, "stopping", Message(_("writing a checkpoint")))
                if hang_watch.update() and (run.stop_requested() or _is_auto_resumed(run)):
                    was_ended = True
                    worker.kill()  # it would not see a SIGTERM; waited for as before
            except RunRemoved:  # nothing is left to save
                worker.kill()
                worker.wait()
                raise
            continue
        if was_ended:
            code = exit_status.EXIT_STOPPED if run.stop_requested() else exit_status.EXIT_HUNG
            recorded = exit_status.recorded_exit_code(run)  # it hung after its work
            return code if recorded is None else recorded
        is_killed = code == -signal.SIGKILL and kill_watch.saw_kill()
        return oom.record_kill(run) if is_killed else code


def _is_auto_resumed(run: Run) -> bool:
    with suppress(UserError):  # a damaged recipe
        return run.recipe().run.auto_resume
    return False


if __name__ == "__main__":
    logs.ignore_write_errors()
    supervise(Run(Path(sys.argv[1])), os.fdopen(int(sys.argv[2]), "ab"))
