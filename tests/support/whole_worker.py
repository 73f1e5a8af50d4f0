"""The entry point of a worker process, forked from a process that has the imports done."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from small_disk import SmallDisk

from jetson_ft import logs
from jetson_ft.events import KINDS, Event
from jetson_ft.runs import store, worker


def work(path: str, kill_at: str, environment: dict[str, str] | None = None) -> None:
    """Do as `python -m jetson_ft.runs.worker PATH`, killed at an event: `KIND`, or `KIND-STEP`.

    With FAULT_AT in the environment, FAULT is raised there instead; with FILL_AT, the small disk
    FILL is filled there, but for FILL_LEAVE bytes.
    """
    import torch

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    log = os.open(Path(path) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logs.ignore_write_errors()
    emit = store.EventLog.emit
    fault_at = os.environ.get("FAULT_AT", "")
    fill_at = os.environ.get("FILL_AT", "")
    places = filter(None, (kill_at, fault_at, fill_at))
    assert {place.partition("-")[0] for place in places} <= KINDS.keys()

    def emit_or_die(self: store.EventLog, event: Event) -> None:
        place = getattr(event, "step", getattr(event, "name", None))
        names = (event.kind, f"{event.kind}-{place}")
        if kill_at in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if fill_at in names:
            SmallDisk(Path(os.environ["FILL"])).fill(int(os.environ["FILL_LEAVE"]))
        if fault_at in names:
            raise RuntimeError(os.environ["FAULT"])
        emit(self, event)

    store.EventLog.emit = emit_or_die  # type: ignore[method-assign]
    sys.exit(worker.main(store.Run(Path(path))))
