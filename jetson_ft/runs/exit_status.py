"""The worker's exit codes, and the run's state that follows from each."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from jetson_ft import files
from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import Exited, Failed
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.store import Run

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_RETRY, EXIT_DISK_FULL = 1, 2, 3, 4, 5


class ExitStatus(NamedTuple):
    state: str
    message: Message | None = None
    resumable: bool = False


def state_for_exit_code(run: Run, code: int) -> ExitStatus:
    """Return the state after a worker's exit code; below zero it is a signal's number."""
    if code == 0:
        return ExitStatus("finished")
    if code == EXIT_STOPPED:
        return ExitStatus("stopped", Message(_("stopped on request; resumable")), True)
    if code < 0:
        return ExitStatus("failed", describe_signal(-code))
    is_resumable = code == EXIT_DISK_FULL
    with suppress(DamagedRun):
        if failure := run.last_event(Failed):
            what = Message.from_json(failure.messages["what"])
            return ExitStatus("failed", what, is_resumable)
    if code == EXIT_DISK_FULL:
        return ExitStatus("failed", files.disk_full(run.path).what, True)
    return ExitStatus("failed", Message(_("ended with code {code}; see log.txt"), {"code": code}))


def describe_signal(number: int) -> Message:
    return Message(_("crashed (signal {number})"), {"number": number})


def recorded_exit_code(run: Run) -> int | None:
    """Return the exit code of the attempt's last event, if the worker wrote one."""
    with suppress(DamagedRun):
        if event := run.last_event(Exited):
            return event.code
    return None


def state_from_events(run: Run) -> ExitStatus:
    """Return the state by the worker's last event, where the supervisor is gone."""
    code = recorded_exit_code(run)
    if code is not None:
        return state_for_exit_code(run, code)
    cause = Message(_("ended without a report (power cut, or killed); resumable"))
    return ExitStatus("failed", cause, True)


def last_error(run: Run) -> UserError:
    """Return why the run's last attempt failed."""
    with suppress(DamagedRun):
        if failure := run.last_event(Failed):
            return UserError.from_json({"messages": failure.messages})
    message = run.state().message
    return UserError(Message.from_json(message) if message else "")
