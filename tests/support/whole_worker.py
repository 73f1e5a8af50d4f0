"""The entry point of a worker process, forked from a process that has the imports done."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

from few_probes import answer_few_probes
from small_disk import SmallDisk

from jetson_ft import logs
from jetson_ft.events import KINDS, Event
from jetson_ft.runs import store, worker
from jetson_ft.runs.event_log import EventLog


def work(path: str, kill_at: str, environment: dict[str, str] | None = None) -> None:
    """Do as `python -m jetson_ft.runs.worker PATH`, killed at an event: `KIND`, or `KIND-STEP`.

    With FAULT_AT in the environment, FAULT is raised there instead; with FILL_AT, the small disk
    FILL is filled there, but for FILL_LEAVE bytes, and emptied at EMPTY_AT. From REFUSE_AT on no
    file can be made, as long as the run's reserved space exists. With ALL_PROBES the comparison
    has all probes.
    """
    import torch

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    if "ALL_PROBES" not in os.environ:
        answer_few_probes()
    log = os.open(Path(path) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logs.ignore_write_errors()
    emit = EventLog.emit
    fault_at = os.environ.get("FAULT_AT", "")
    names_of = ("FILL_AT", "EMPTY_AT", "REFUSE_AT")
    fill_at, empty_at, refuse_at = (os.environ.get(name, "") for name in names_of)
    places = filter(None, (kill_at, fault_at, fill_at, empty_at, refuse_at))
    assert {place.partition("-")[0] for place in places} <= KINDS.keys()

    def emit_or_die(self: EventLog, event: Event) -> None:
        place = getattr(event, "step", getattr(event, "name", None))
        names = (event.kind, f"{event.kind}-{place}")
        if kill_at in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if fill_at in names:
            SmallDisk(Path(os.environ["FILL"])).fill(int(os.environ["FILL_LEAVE"]))
        if empty_at in names:
            SmallDisk(Path(os.environ["FILL"])).empty()
        if refuse_at in names:
            refuse_writes(Path(path) / "reserve")
        if fault_at in names:
            raise RuntimeError(os.environ["FAULT"])
        emit(self, event)

    EventLog.emit = emit_or_die  # type: ignore[method-assign]
    sys.exit(worker.main(store.Run(Path(path))))


def refuse_writes(reserve: Path) -> None:
    """Let every new file and folder fail as on a full disk, as long as the reserve exists."""
    mkdir, open_file = os.mkdir, os.open

    def refuse(flags: int) -> None:
        if flags & os.O_CREAT and reserve.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def new_folder(*arguments: Any, **options: Any) -> None:
        refuse(os.O_CREAT)
        mkdir(*arguments, **options)

    def new_file(name: Any, flags: int, *arguments: Any, **options: Any) -> int:
        refuse(flags)
        return open_file(name, flags, *arguments, **options)

    os.mkdir, os.open = new_folder, new_file
