#!/opt/venv/bin/python -IS
"""What the container runs: `jetson-ft` with the arguments given, and no run is lost at its end.

A run's supervisor outlives the page that started it, but not the container: when its first process
ends, the kernel kills the rest. So `docker stop`, which tells that first process alone, is passed
on here to every supervisor; each leaves a checkpoint, and only then does this process end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SUPERVISOR = b"jetson_ft.runs.supervisor"


def supervisors() -> list[int]:
    """Process numbers of this container's supervisors, wherever their runs lie."""
    here, found = Path("/proc/self/ns/mnt").readlink(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or another user's
            is_one = SUPERVISOR in (process / "cmdline").read_bytes().split(b"\0")
            # With --pid=host, those of other containers and of the board itself show too.
            if is_one and (process / "ns/mnt").readlink() == here:
                found.append(int(process.name))
    return found


def stop_runs() -> None:
    """Asks for checkpoints and waits for them; Docker's stop timeout is the limit."""
    told: set[int] = set()
    while alive := supervisors():
        for number in set(alive) - told:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGTERM)
        told.update(alive)
        time.sleep(0.1)


class Stop(Exception):
    """`docker stop`."""


def main(command: list[str]) -> int:
    """Runs it; returns its exit code, 128 and more for a signal, as a shell does."""

    program = subprocess.Popen(command)

    def interrupt(*_: object) -> None:
        if not sys.stdin.isatty():  # a terminal sends Ctrl-C to both
            program.send_signal(signal.SIGINT)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stop

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, stop)
    try:
        code = program.wait()
        time.sleep(0.5)  # a run that has just finished needs no stop: its supervisor is leaving
        stop_runs()
    except Stop:
        print("stopping; runs are writing their checkpoints", flush=True)
        program.terminate()
        stop_runs()
        try:
            code = program.wait(5)
        except subprocess.TimeoutExpired:  # a page waits for browsers that stay connected
            program.kill()
            code = program.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(["jetson-ft", *sys.argv[1:]]))
