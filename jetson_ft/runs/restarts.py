"""Restarts of a run without a person (`run.auto_resume`), counted in `state.json`.

A new checkpoint resets the count: a run that makes progress between two crashes is restarted for
ever; one that crashes again and again at the same place is not. The supervisor imports this module,
so it imports no torch.
"""

from __future__ import annotations

from contextlib import suppress

from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import Warned
from jetson_ft.runs.event_log import emit_once
from jetson_ft.runs.exit_status import ExitStatus
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint


def newest_step(run: Run) -> int:
    """Return the step of the newest checkpoint; 0 without one."""
    return max(map(checkpoint.step_of, checkpoint.list_checkpoints(run.checkpoints)), default=0)


def next_restart(run: Run, status: ExitStatus) -> tuple[int | None, ExitStatus]:
    """Return the next restart's number in a row, from 1; None: the run is not restarted.

    Args:
        status: of the attempt that has ended.

    Return also the status to record if there is no restart: after `run.max_restarts` it says so,
    and a person has to resume the run.
    """
    if not status.interrupted:
        return None, status
    with suppress(UserError):  # a damaged file: the run is offered to a person
        settings, state = run.recipe().run, run.state()
        number = 1 if newest_step(run) > state.restart_step else state.restarts + 1
        if not settings.auto_resume:
            return None, status
        if number <= settings.max_restarts:
            return number, status
        text = _(
            "restarted {count} times in a row without a new checkpoint, so it waits until it is "
            "resumed by hand (see log.txt); the last attempt: {reason}"
        )
        values = {"count": state.restarts, "reason": status.message or ""}
        return None, status._replace(message=Message(text, values), interrupted=False)
    return None, status


def record(run: Run, reason: Message | None) -> None:
    """Emit a warning on the restart that `state.json` counts.

    Args:
        reason: why the attempt before it ended.
    """
    text = _("restart {number} of at most {limit}, from the last checkpoint, after: {reason}")
    state = run.state()
    values = {
        "number": state.restarts,
        "limit": run.recipe().run.max_restarts,
        "reason": reason or "",
    }
    emit_once(run, Warned.of_message(Message(text, values)))
