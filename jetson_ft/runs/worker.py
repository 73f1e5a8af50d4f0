"""The process that trains: `python -m jetson_ft.runs.worker RUN`, started by the supervisor with
`worker.lock` taken and inherited.

Exit codes: 0 finished, 1 a fault of this program, 2 refused (`UserError`),
3 stopped on request, 4 out of memory and to be started once more, 5 the disk is full.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from jetson_ft import logs
from jetson_ft.child_process import end_with_parent
from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.events import Emit, Event, Exited, Failed, Warned
from jetson_ft.files import is_disk_full
from jetson_ft.runs import hang, oom
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.exit_status import (
    EXIT_DISK_FULL,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_RETRY,
    EXIT_STOPPED,
)
from jetson_ft.runs.oom import OutOfMemory
from jetson_ft.runs.processes import (
    LAUNCHER_PROCESS,
    explain_error,
    silence_libraries,
    stop_on_sigterm,
)
from jetson_ft.runs.store import Run
from jetson_ft.training import distributed
from jetson_ft.training.memory import is_out_of_memory


def main(run: Run, on_interrupt: Any = signal.SIG_IGN, dump_stacks: bool = False) -> int:
    """Work on the run until it is finished, stopped, failed or removed; return the exit code.

    Args:
        on_interrupt: handler of SIGINT; by default the command that launched it handles Ctrl-C.
        dump_stacks: write the stacks of all threads to stderr when the work hangs.
    """
    is_local_main = distributed.is_local_main_process()
    attempt = run.state_or_derived().attempt
    stop_on_sigterm(run)
    signal.signal(signal.SIGINT, on_interrupt)
    silence_libraries()
    emit = EventLog(run, attempt).emit if is_local_main else lambda _event: None
    if dump_stacks:
        emit = hang.StackDump(emit).emit
    if LAUNCHER_PROCESS in os.environ:  # the launcher holds `worker.lock` for this process
        end_with_parent(LAUNCHER_PROCESS)
    is_launched = distributed.is_launched()
    code = _work(run, emit)
    # For `manager.reconcile_state`, if the supervisor that waits for the exit code is gone.
    _emit_last(emit, Exited(code=code))
    # torch's launcher takes any code but 0 for a fault, and ends the other processes.
    return 0 if is_launched and code == EXIT_STOPPED else code


def _work(run: Run, emit: Emit) -> int:
    try:
        from jetson_ft.runs.pipeline import Pipeline

        finished = Pipeline(run, emit, run.stop_requested, distributed.connect()).finetune()
    except Exception as error:
        traceback.print_exc()
        fix = _("Resume the run; if it fails again, report it with log.txt from the run's folder.")
        is_short = is_out_of_memory(error)
        explained = oom.explain_oom(run) if is_short else explain_error(error, Message(fix))
        if isinstance(explained, OutOfMemory):
            if explained.retry:
                _emit_last(emit, Warned.of_message(joined([explained.what, explained.fix], " ")))
                return EXIT_RETRY
            _emit_last(emit, Failed(**explained.as_json()))
            return EXIT_FAILED
        is_full = is_disk_full(explained)
        if is_full:
            run.release_space()  # for the events that follow
        _emit_last(emit, Failed(**explained.as_json()))
        if is_full:
            return EXIT_DISK_FULL
        return EXIT_REFUSED if isinstance(error, UserError) else EXIT_FAILED
    return 0 if finished else EXIT_STOPPED


def _emit_last(emit: Emit, event: Event) -> None:
    """Emit one of the last events; if the disk takes none, the exit code has to do."""
    with suppress(UserError):
        emit(event)


if __name__ == "__main__":
    logs.ignore_write_errors()
    logs.log_to_stderr()  # which is log.txt
    sys.exit(main(Run(Path(sys.argv[1])), dump_stacks=True))
