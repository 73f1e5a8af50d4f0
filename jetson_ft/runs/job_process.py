"""The keeper of a job: runs a command of `jetson-ft`, ends it on request, records how it ended.

Run as `python -m jetson_ft.runs.job_process FOLDER LOCK …`; each LOCK is the number of an open,
locked file that the starting process hands over. The command inherits them, and ends with its
keeper: a job that isn't locked has no process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jetson_ft import logs
from jetson_ft.child_process import PARENT_PROCESS, PROGRESS_FILE, python_module
from jetson_ft.errors import UserError, _
from jetson_ft.files import DiskFull, write_json
from jetson_ft.runs import jobs
from jetson_ft.runs.jobs import Job

_POLL_SECONDS = 0.25
_STOP_SECONDS = 10.0  # for the command to end by itself
_MAX_OUTPUT_BYTES = 1 << 20


def keep(folder: Path, locks: list[int]) -> None:
    """Run the job's command; write its result and its end into `job.json`."""
    stop_file = folder / "stop"

    def request_stop(*_: Any) -> None:  # the container or the service ends
        with suppress(OSError):
            stop_file.touch()

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored signals are inherited
    job, deadline = jobs.read_record(folder), 0.0
    environment = {
        **os.environ,
        PARENT_PROCESS: str(os.getpid()),
        PROGRESS_FILE: str(folder / "progress.json"),
    }
    with tempfile.TemporaryFile(dir=folder) as output, jobs.open_log(folder) as log:
        command = subprocess.Popen(
            python_module("jetson_ft.cli", *job.arguments), env=environment, pass_fds=locks,
            stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True,
        )  # fmt: skip
        while True:
            with suppress(subprocess.TimeoutExpired):
                command.wait(_POLL_SECONDS)
                break
            is_late = deadline and time.monotonic() > deadline
            if is_late or not folder.is_dir():  # or the run was deleted
                os.killpg(command.pid, signal.SIGKILL)
            elif stop_file.exists() and not deadline:
                command.send_signal(signal.SIGINT)  # as Ctrl-C: it removes what is half-made
                deadline = time.monotonic() + _STOP_SECONDS
            elif not job.result and (result := _printed_object(output.fileno())):
                ready = replace(job, result=result)  # of a server
                with suppress(DiskFull):  # then the next round tries again
                    write_json(folder / "job.json", asdict(ready))
                    job = ready
        printed = _printed_object(output.fileno())
    if folder.is_dir():
        ended = _end(job, command.returncode, printed, stop_file.exists())
        write_json(folder / "job.json", asdict(ended))


def _end(job: Job, code: int, printed: dict[str, Any], is_stopped: bool) -> Job:
    """Return the job with its end; `printed` is the object that the command printed."""
    job = replace(job, ended=time.time(), result={} if "error" in printed else printed)
    is_export = code == 0 and "exports" in printed  # made, even where the request came at its end
    if is_stopped and not is_export:
        return replace(job, state="stopped")
    if code == 0:
        return replace(job, state="finished")
    if code == -signal.SIGKILL:
        error = UserError(
            _("The command was killed; most likely the machine ran out of memory."),
            fix=_("Close other programs, then try again."),
        )
    else:
        error = UserError(_("The command ended with code {code}; its log may say why."), code=code)
    with suppress(ValueError, KeyError, TypeError):
        error = UserError.from_json(printed["error"])
    return replace(job, state="failed", error=error.as_json())


def _printed_object(number: int) -> dict[str, Any]:
    """Return the last complete JSON object in an open file; an empty one where there is none."""
    text = os.pread(number, _MAX_OUTPUT_BYTES, 0).decode("utf-8", "replace").lstrip()
    value, decoder = None, json.JSONDecoder()
    with suppress(ValueError):
        while text:
            value, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    logs.ignore_write_errors()
    keep(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
