"""The process that trains: `python -m jetson_ft.runs.worker RUN`, started by the supervisor.

Exit codes: 0 finished, 1 a fault of this program, 2 refused with a plain message,
3 stopped on request, 4 out of memory and to be started once more.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError
from jetson_ft.runs.ending import EXIT_AGAIN, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from jetson_ft.runs.rundir import EventLog, Log, Run, Silence, lock
from jetson_ft.training import group
from jetson_ft.training.memory import OutOfMemory, is_out_of_memory


def main(run: Run) -> int:
    """Works on the run until it is finished, stopped or failed."""
    leads = group.leads_its_machine()
    held = lock(run.path / "worker.lock", patience=1.0) if leads else None
    if leads and held is None:
        return EXIT_FAILED
    attempt = run.state().attempt
    signal.signal(signal.SIGTERM, lambda *_: run.request_stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to translate
    quieten()
    log = EventLog(run, attempt) if leads else Silence()
    launched = group.is_launched()
    code = _work(run, log)
    # For `jobs.settle`, should the supervisor be gone that waits for the exit code.
    _tell(log, "end", code=code)
    # A launcher takes any code but 0 for a fault, and ends the other processes.
    return 0 if launched and code == EXIT_STOPPED else code


def _work(run: Run, log: Log) -> int:
    try:
        from jetson_ft.runs.pipeline import Pipeline

        finished = Pipeline(run, log, run.stop_requested, group.join()).finetune()
    except Exception as error:
        traceback.print_exc()
        plain = explain(error)
        code = _code(error)
        if code == EXIT_AGAIN:
            _tell(log, "warning", message=f"{plain.what} {plain.fix}")
        else:
            _tell(log, "error", what=plain.what, where=plain.where, fix=plain.fix)
        return code
    return 0 if finished else EXIT_STOPPED


def _code(error: Exception) -> int:
    if isinstance(error, OutOfMemory):
        return EXIT_AGAIN if error.again else EXIT_FAILED
    return EXIT_REFUSED if isinstance(error, UserError) else EXIT_FAILED


def _tell(log: Log, kind: str, **fields: Any) -> None:
    """A last word; where the disk takes none, the exit code has to do."""
    with suppress(UserError):
        log.emit(kind, **fields)


def explain(error: Exception) -> UserError:
    """Any exception as something a person can act on."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        return UserError(
            "Out of memory.",
            "training",
            "Lower data.max_length or lora.rank, or use quantize: nf4; close other programs.",
        )
    return UserError(
        f"A fault in this program: {type(error).__name__}: {error}",
        "log.txt in the run's folder has the details",
        "Resume the run; if it fails again, report it with that file.",
    )


def quieten() -> None:
    """No progress bars into the log; our events say what goes on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


if __name__ == "__main__":
    sys.exit(main(Run(Path(sys.argv[1]))))
