#!/opt/venv/bin/python -IS
"""Run `jetson-ft` as the container's first program; when the container stops, checkpoint all runs.

A run's supervisor, and the keeper of a job such as an export, outlive the page that started them,
but not the container: when the first process ends, the kernel kills all others. `docker stop` sends
SIGTERM to the first process only. So this program sends it on to every supervisor and keeper, and
waits until they have written their checkpoints and ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

DETACHED = {b"jetson_ft.runs.supervisor", b"jetson_ft.runs.job_process"}


def detached_processes() -> list[int]:
    """Return the process ids of all supervisors, and keepers of jobs, in this container."""
    namespace, pids = Path("/proc/self/ns/mnt").readlink(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            is_ours = DETACHED & set((process / "cmdline").read_bytes().split(b"\0"))
            # With --pid=host, processes of the board and of other containers are listed too.
            if is_ours and (process / "ns/mnt").readlink() == namespace:
                pids.append(int(process.name))
    return pids


def stop_runs() -> None:
    """Stop all runs and jobs, and wait for their end; Docker's stop timeout is the limit."""
    signalled: set[int] = set()
    while alive := detached_processes():
        for pid in set(alive) - signalled:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        signalled.update(alive)
        time.sleep(0.1)


class Stop(Exception):
    """`docker stop` sent SIGTERM."""


def main(command: list[str]) -> int:
    """Run the command; return its exit code, or 128 plus the signal, as a shell does."""
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
        time.sleep(0.5)  # the supervisor of a run that has just finished ends by itself
        stop_runs()
    except Stop:
        print("stopping; runs are writing their checkpoints", flush=True)
        program.terminate()
        stop_runs()
        try:
            code = program.wait(5)
        except subprocess.TimeoutExpired:  # the page waits for connected browsers
            program.kill()
            code = program.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(["jetson-ft", *sys.argv[1:]]))
