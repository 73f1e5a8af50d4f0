"""Notices a run that hangs: no progress for many times as long as usual.

The worker writes the stacks of all its threads to `log.txt`, by a thread in C that needs no GIL.
The supervisor reports it, as it sees no new events, and ends the worker if the run is restarted by
itself (`run.auto_resume`) or is asked to stop. A suspended machine doesn't hang: the clock of both,
CLOCK_MONOTONIC, stops meanwhile. This module imports no torch.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from contextlib import suppress

from jetson_ft import events
from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import PHASES, Emit, Event
from jetson_ft.i18n import duration
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.event_log import emit_once
from jetson_ft.runs.event_reader import read_events
from jetson_ft.runs.store import Run

STEP_SECONDS = 300.0  # the shortest limit: a machine can be busy with other things
PHASE_SECONDS = 3600.0  # for loading, rows, the first step and the comparison, whose time varies
_STEPS, _EVALUATIONS = 20, 5  # the limit in usual steps and evaluations
_MARGIN_SECONDS = 2.0  # after which the stacks are in log.txt
_STDERR = 2  # log.txt


class Progress:
    """How long the work may go on without a new event, by the events so far."""

    def __init__(self) -> None:
        self.limit: float | None = PHASE_SECONDS  # in seconds; None: it waits on purpose
        self.phase = "libraries"
        self.step_seconds: float | None = None  # of a usual step
        self._heldout_tokens = 0
        self._evaluation_seconds: float | None = None

    def update(self, event: Event) -> bool:
        """Take in an event; return whether it is a sign of progress."""
        match event:
            case events.Sensors() | events.Warned():  # of other threads and processes
                return False
            case events.Paused():
                self.limit = None
                return True
            case events.DataPrepared():
                tokens = event.heldout.get("tokens")  # of a damaged line, anything
                self._heldout_tokens = max(0, tokens) if isinstance(tokens, int) else 0
            case events.PhaseStarted():
                self.phase, self.step_seconds = event.name, None
            case events.Step():
                self.phase = "training"
                rate = max(event.tokens_per_second, 1e-3)
                self.step_seconds = event.tokens / event.step / rate
                if self._evaluation_seconds is None:
                    # An estimate, on the long side: training computes more per token.
                    self._evaluation_seconds = self._heldout_tokens / rate
            case events.Evaluated():
                self._evaluation_seconds = event.seconds
            case events.PhaseEnded():
                self.step_seconds = None
            case events.Exited():
                self.limit = STEP_SECONDS
                return True
        self.limit = PHASE_SECONDS
        if self.step_seconds is not None:
            # An evaluation may follow a step, and has no event of its own before its end.
            evaluations = _EVALUATIONS * (self._evaluation_seconds or 0.0)
            self.limit = max(STEP_SECONDS, _STEPS * self.step_seconds + evaluations)
        return True


class StackDump:
    """In the worker: writes the stacks of all threads to `log.txt` when no event comes in time."""

    def __init__(self, emit: Emit) -> None:
        self._emit, self._progress, self._lock = emit, Progress(), threading.Lock()
        faulthandler.dump_traceback_later(PHASE_SECONDS, file=_STDERR)

    def emit(self, event: Event) -> None:
        """Emit an event, and start to wait anew if it is a sign of progress."""
        self._emit(event)
        with self._lock:
            if not self._progress.update(event):
                return
            if self._progress.limit is None:
                faulthandler.cancel_dump_traceback_later()
            else:
                faulthandler.dump_traceback_later(self._progress.limit, file=_STDERR)


class HangWatch:
    """In the supervisor: notices that the worker writes no events; `update` it some times a second.

    Create it before the worker starts.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._progress = run, Progress()
        self._offset = run.events_file.stat().st_size if run.events_file.exists() else 0
        self._progress_at = time.monotonic()
        self.is_hanging = False

    def update(self) -> bool:
        """Read new events, and report a hang in the events and the state, or its end.

        Return whether it has taken so long that the worker may be ended: twice the limit.
        """
        read: list[Event] = []
        with suppress(DamagedRun):  # as without new events
            read, self._offset = read_events(self._run.events_file, self._offset)
        signs = [self._progress.update(event) for event in read]
        if any(signs):
            self._progress_at = time.monotonic()
            if self.is_hanging:
                self.is_hanging = False
                self._write_reason(None)
        limit, waited = self._progress.limit, time.monotonic() - self._progress_at
        if limit is None:
            return False
        if waited > limit + _MARGIN_SECONDS and not self.is_hanging:
            self.is_hanging = True
            reason = self._reason(waited)
            with suppress(UserError):  # the disk is full
                emit_once(self._run, events.Warned.of_message(reason))
            self._write_reason(reason)
        return waited > 2 * limit + _MARGIN_SECONDS

    def _write_reason(self, reason: Message | None) -> None:
        with suppress(UserError):  # the disk is full
            self._run.write_state(self._run.state_or_derived().state, reason)

    def _reason(self, waited: float) -> Message:
        usual = self._progress.step_seconds
        if usual is None:
            text = _("no progress for {duration} ({phase}); see the stacks in log.txt")
            phase = self._progress.phase
            values = {"duration": duration(waited), "phase": Message(PHASES.get(phase, phase))}
            return Message(text, values)
        text = _("no step for {duration}, usually {usual:.1f} s; see the stacks in log.txt")
        return Message(text, {"duration": duration(waited), "usual": usual})
