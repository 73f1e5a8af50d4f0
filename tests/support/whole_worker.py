"""The entry point of a worker process, forked from a process that has the imports done."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from jetson_ft.events import KINDS, Event
from jetson_ft.runs import store, worker


def work(path: str, kill_at: str, environment: dict[str, str] | None = None) -> None:
    """Do as `python -m jetson_ft.runs.worker PATH`, killed at an event: `KIND`, or `KIND-STEP`.

    With FAULT_AT in the environment, FAULT is raised there instead.
    """
    import torch

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    log = os.open(Path(path) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    emit = store.EventLog.emit
    fault_at = os.environ.get("FAULT_AT", "")
    assert {place.partition("-")[0] for place in (kill_at, fault_at) if place} <= KINDS.keys()

    def emit_or_die(self: store.EventLog, event: Event) -> None:
        place = getattr(event, "step", getattr(event, "name", None))
        names = (event.kind, f"{event.kind}-{place}")
        if kill_at in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault_at in names:
            raise RuntimeError(os.environ["FAULT"])
        emit(self, event)

    store.EventLog.emit = emit_or_die  # type: ignore[method-assign]
    sys.exit(worker.main(store.Run(Path(path))))
