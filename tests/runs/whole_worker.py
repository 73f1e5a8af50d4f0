"""The entry of a worker process that is forked from one which has the imports behind it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from jetson_ft.runs import rundir, worker


def work(path: str, kill_at: str, environment: dict[str, str] | None = None) -> None:
    """`python -m jetson_ft.runs.worker PATH`, killed at an event: `KIND`, or `KIND-STEP`.

    With FAULT_AT in the environment it raises FAULT there instead.
    """
    import torch

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    log = os.open(Path(path) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    emit = rundir.EventLog.emit
    fault_at = os.environ.get("FAULT_AT")

    def emit_or_die(self: rundir.EventLog, kind: str, **fields: Any) -> None:
        names = (kind, f"{kind}-{fields.get('step', fields.get('name'))}")
        if kill_at in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault_at in names:
            raise RuntimeError(os.environ["FAULT"])
        emit(self, kind, **fields)

    rundir.EventLog.emit = emit_or_die  # type: ignore[method-assign]
    sys.exit(worker.main(rundir.Run(Path(path))))
