"""The small process beside each run: waits for its turn, starts the worker, records the end.

Run as `python -m jetson_ft.runs.supervisor RUN`. It loads no torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from jetson_ft.runs.jobs import Slot
from jetson_ft.runs.rundir import Run, lock, read_events

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED = 1, 2, 3
_POLL_SECONDS = 0.25


def supervise(run: Run) -> None:
    """From queued to the worker's end."""
    held = lock(run.path / "supervisor.lock")
    if held is None:
        return
    with held:
        slot = _wait_for_turn(run)
        if slot is None:
            run.write_state("stopped", "stopped while waiting in the queue")
            return
        with slot:
            code = _watch(run, slot)
            run.write_state(*_ending(run, code))
    run.clear_stop()


def _wait_for_turn(run: Run) -> IO[bytes] | None:
    slot = Slot()
    told = False
    while not run.stop_requested():
        held = slot.try_take()
        if held:
            return held
        if not told:
            run.write_state("queued", "another run is training; this one starts after it")
            told = True
        time.sleep(_POLL_SECONDS)
    slot.leave()
    return None


def _watch(run: Run, slot: IO[bytes]) -> int:
    command = [sys.executable, "-m", "jetson_ft.runs.worker", str(run.path)]
    with open(run.path / "log.txt", "ab") as log:
        worker = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[slot.fileno()]
        )
    run.write_state("running")
    # A terminated supervisor asks its worker to stop and stays to record how that went.
    signal.signal(signal.SIGTERM, lambda *_: run.request_stop())
    told = False
    while True:
        try:
            return worker.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if run.stop_requested() and not told:
                run.write_state("stopping", "writing a checkpoint")
                told = True


def _ending(run: Run, code: int) -> tuple[str, str]:
    """(state, reason) for a worker's exit code."""
    if code == 0:
        return "finished", ""
    if code == EXIT_STOPPED:
        return "stopped", "stopped on request; resumable"
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; most likely the kernel ended it for want of memory" if code == -9 else ""
        return "failed", f"crashed (signal {-code}, {name}){hint}"
    events, _ = read_events(run.events_file)
    errors = [event for event in events if event["kind"] == "error"]
    return "failed", errors[-1]["what"] if errors else f"ended with code {code}; see log.txt"


if __name__ == "__main__":
    supervise(Run(Path(sys.argv[1])))
