"""The small process beside each run: waits for its turn, starts the worker, records the end.

Run as `python -m jetson_ft.runs.supervisor RUN LOCK`, LOCK being the number of the open,
locked file that its launcher hands over. It loads no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from jetson_ft.runs import ending, processes
from jetson_ft.runs.rundir import Run
from jetson_ft.runs.slot import Slot

_POLL_SECONDS = 0.25
WORKER_ENVIRONMENT = {
    # OpenMP threads that spin without end while they wait make training several times slower as
    # soon as anything else runs on the machine; those that never spin are slow to wake.
    "GOMP_SPINCOUNT": "20000",
    # Whatever glibc cuts off an aligned block goes into its caches for small objects, where it
    # keeps the large free blocks on both sides from growing together (glibc's bug 14581). A
    # training on a CPU without these caches takes a sixth less memory.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    # oneDNN keeps a kernel for each of the last 1,024 shapes that it met, PyTorch's layer above it
    # another 1,024, and every micro-batch has a length of its own (docs/decisions/0009).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "32",
}


def supervise(run: Run, held: IO[bytes]) -> None:
    """From queued to the worker's end, as the owner of the run's `supervisor.lock`."""
    # A terminated supervisor asks its worker to stop and stays to record how that went.
    signal.signal(signal.SIGTERM, lambda *_: run.request_stop())
    with held:
        slot = _wait_for_turn(run)
        if slot is None:
            _end(run, "stopped", "stopped while waiting in the queue; resumable")
        else:
            with slot:
                _end(run, *ending.of_code(run, _work(run, slot)))


def _end(run: Run, state: str, reason: str) -> None:
    run.clear_stop()  # first, so that nobody sees an ended run that is asked to stop
    run.write_state(state, reason)


def _wait_for_turn(run: Run) -> IO[bytes] | None:
    slot = Slot(since=run.state().updated)
    told = False
    while not run.stop_requested():
        held = slot.try_take(run.path)
        if held:
            return held
        if not told:
            run.write_state("queued", "another run is training; this one starts after it")
            told = True
        time.sleep(_POLL_SECONDS)
    slot.leave()
    return None


def _work(run: Run, slot: IO[bytes]) -> int:
    """The worker's exit code; who ran out of memory may ask for a second attempt, once."""
    code = _watch(run, slot)
    if code != ending.EXIT_AGAIN:
        return code
    if run.stop_requested():
        return ending.EXIT_STOPPED
    run.write_state("running", attempt=run.state().attempt + 1)
    return _watch(run, slot)


def _watch(run: Run, slot: IO[bytes]) -> int:
    program = "launcher" if processes.of(run).several else "worker"
    command = [sys.executable, "-m", f"jetson_ft.runs.{program}", str(run.path)]
    with open(run.path / "log.txt", "ab") as log:
        worker = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=[slot.fileno()], env={**WORKER_ENVIRONMENT, **os.environ},
        )  # fmt: skip
    run.write_state("running")
    told = False
    while True:
        try:
            return worker.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if run.stop_requested() and not told:
                run.write_state("stopping", "writing a checkpoint")
                told = True


if __name__ == "__main__":
    supervise(Run(Path(sys.argv[1])), os.fdopen(int(sys.argv[2]), "ab"))
