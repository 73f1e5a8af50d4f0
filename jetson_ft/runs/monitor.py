"""Progress and curves of runs, updated from their events as the files grow; each byte is read once.

For the page, which reads runs again and again; `Run.iter_events` is for reading a run once. A
request reads for a fraction of a second at most: of a very long log it shows what is read so far.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jetson_ft import events
from jetson_ft.errors import UserError, _
from jetson_ft.events import Event
from jetson_ft.files import printable
from jetson_ft.runs import contents, manager, processes
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.curve import Curve
from jetson_ft.runs.event_reader import E, read_events
from jetson_ft.runs.store import LIVE_STATES, Run, State

T = TypeVar("T")
# The fields that can be drawn, by kind of event.
CURVES: dict[type[Event], tuple[str, ...]] = {
    events.Step: ("loss", "lr", "grad_norm", "tokens_per_second", "memory", "tokens"),
    events.Evaluated: ("heldout_loss",),
    events.Sensors: ("watts", "temperature"),
}
COOLING, DAMAGED = "cooling", "damaged"
PREPARE, TRAIN, MEASURE, DONE = STAGES = ("prepare", "train", "measure", "done")
# Phase -> its stage; all others prepare.
_STAGE_OF_PHASE = {"training": TRAIN, "comparison": MEASURE, "report": MEASURE}
_SHOWN_FILES = (
    "state.json", "recipe.yaml", "events.jsonl", "about.json", "plan.json", "data.json",
    "processes.json", "log.txt", "report.json", "adapter",
)  # fmt: skip
_MAX_WARNINGS = 20  # kept of an attempt, the first ones
_READ_SECONDS = 0.2  # of one call of `RunMonitor.progress`, about
_MAX_FOLLOWED = 32  # runs whose progress is kept: those that were looked at last
_TAIL_BYTES = 1 << 18  # some hundreds of events


@dataclass
class RunProgress:
    """The state of a run's work, by its events so far."""

    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    phase: str = ""  # started and not ended; `COOLING` while training pauses to cool
    stage: str = PREPARE  # of the newest phase
    stage_seconds: dict[str, float] = field(default_factory=dict)  # of the attempt's ended phases
    attempt: int = 0  # of the newest event
    warnings: list[events.Warned] = field(default_factory=list)  # of the attempt, distinct
    offset: int = 0  # bytes of the events that are read
    size: int = 0  # bytes of the events; they are read as far as whole lines go
    is_complete: bool = True  # all of them are read
    _last: dict[type[Event], Event] = field(default_factory=dict)

    def snapshot(self) -> RunProgress:
        """Return a copy that `update` doesn't change."""
        return replace(
            self, curves=copy.deepcopy(self.curves), stage_seconds={**self.stage_seconds},
            warnings=[*self.warnings], _last={**self._last},
        )  # fmt: skip

    def last(self, kind: type[E]) -> E | None:
        """Return the newest event of one kind."""
        event = self._last.get(kind)
        return event if isinstance(event, kind) else None

    def update(self, event: Event) -> None:
        """Take in the next event."""
        self._last[type(event)] = event
        if event.attempt != self.attempt:
            self.attempt = event.attempt
            self.warnings.clear()
            self.stage_seconds.clear()
            self._last.pop(events.Generated, None)
        if isinstance(event, events.PhaseStarted | events.PhaseEnded):
            self.stage = _STAGE_OF_PHASE.get(event.name, PREPARE)
            self.phase = event.name if isinstance(event, events.PhaseStarted) else ""
            self._last.pop(events.Download, None)
            if isinstance(event, events.PhaseEnded):
                spent = self.stage_seconds.get(self.stage, 0.0)
                self.stage_seconds[self.stage] = spent + event.seconds
        elif isinstance(event, events.Paused | events.PauseEnded):
            self.phase = COOLING if isinstance(event, events.Paused) else "training"
        elif isinstance(event, events.Step | events.Generated):  # the phase began long ago
            self.phase = "training" if isinstance(event, events.Step) else "comparison"
            self.stage = _STAGE_OF_PHASE[self.phase]
        elif isinstance(event, events.Warned):
            is_new = event.message not in [warned.message for warned in self.warnings]
            if is_new and len(self.warnings) < _MAX_WARNINGS:
                self.warnings.append(event)
        step = getattr(event, "step", None)
        if isinstance(step, int):
            for name in CURVES.get(type(event), ()):
                value = getattr(event, name)
                if isinstance(value, int | float):
                    self.curves[name].add(step, value)
        if isinstance(event, events.Step) and event.tokens_per_second > 0:
            self.curves["seconds"].add(event.step, event.tokens / event.tokens_per_second)


class _Followed:
    """The progress of one run, and the lock of what updates it."""

    def __init__(self) -> None:
        self.lock, self.progress = threading.Lock(), RunProgress()


class RunMonitor:
    """Follows the events of runs; all clients of a page share one. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the dictionaries; held for no reading
        self._followed: dict[Path, _Followed] = {}
        self._summaries: dict[Path, tuple[Any, RunSummary]] = {}

    def progress(self, run: Run) -> RunProgress:
        """Return the run's progress by its events, as far as they can be read in short time.

        The next call continues. Calls for other runs don't wait for this one.

        Raises:
            DamagedRun: `events.jsonl` can't be read.
        """
        with self._lock:
            followed = self._followed.pop(run.path, None) or _Followed()
            self._followed[run.path] = followed  # as the newest
            while len(self._followed) > _MAX_FOLLOWED:
                del self._followed[next(iter(self._followed))]
        with followed.lock:
            size = _stamp(run.events_file)[1]
            if size < followed.progress.offset:  # another run of that name
                followed.progress = RunProgress()
            progress, deadline = followed.progress, time.monotonic() + _READ_SECONDS
            progress.size, progress.is_complete = size, False
            while time.monotonic() < deadline and not progress.is_complete:
                chunk, offset = read_events(run.events_file, progress.offset)
                for event in chunk:
                    progress.update(event)
                progress.is_complete = offset == progress.offset
                progress.offset = offset
            return progress.snapshot()

    def summary(self, run: Run) -> RunSummary:
        """Return the run's summary; its `faults` name what is damaged."""
        with self._lock:
            stamp, summary = self._summaries.get(run.path, (None, None))
        now = change_stamp(run)
        if (
            summary is None or stamp != now or summary.faults
            or summary.state.state in LIVE_STATES
        ):  # fmt: skip
            with suppress(UserError):  # which is among the summary's faults
                manager.reconcile_state(run)
            now = change_stamp(run)
        if summary is None or stamp != now:
            summary = summarize(run)
            with self._lock:
                self._summaries[run.path] = (now, summary)
        return summary


@dataclass(frozen=True)
class RunSummary:
    """A run in a list."""

    name: str
    title: str
    state: State  # `damaged` if it isn't known
    faults: tuple[UserError, ...] = ()  # of the run's files
    is_live: bool = False  # processes of it live, or may live
    model: str = ""  # of the recipe
    rank: int | None = None
    rows: int | None = None  # trained on; None until they are read
    stage: str = PREPARE  # one of `STAGES`; of a run that has not finished, the one it is or was in
    seconds: float | None = None  # of training so far, over all attempts
    step: int = 0
    total_steps: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    heldout_loss: float | None = None  # of the adapter, else the newest one
    phase: str = ""
    download: events.Download | None = None  # while one goes on
    generated: events.Generated | None = None  # progress of the comparison

    @property
    def share(self) -> float | None:
        """Share of the training steps made; None while the run does not train, or is not known."""
        if not (self.is_live and self.stage == TRAIN and self.total_steps):
            return None
        return min(1.0, self.step / self.total_steps)


def summarize(run: Run) -> RunSummary:
    """Return the run's summary by its files as they are; damaged ones raise nothing.

    Each file is read once: the page does this for each live run, every few seconds.
    """
    faults: list[UserError] = []

    def attempt(read: Callable[[], T], otherwise: T) -> T:
        """Return what `read` returns; collect the fault that it raises."""
        try:
            return read()
        except UserError as error:
            faults.append(error)
            return otherwise

    def read_report() -> dict[str, Any] | None:
        return run.report() if os.path.lexists(run.path / "report.json") else None

    state = attempt(run.state, State(DAMAGED))
    about: dict[str, str] = attempt(run.about, {})
    progress = attempt(lambda: read_progress(run), RunProgress())
    locks = [attempt(partial(run.is_locked, name), False) for name in ("worker", "supervisor")]
    recipe, data = attempt(run.recipe, None), attempt(run.last_data, None)
    report = attempt(read_report, None)
    checks: tuple[Callable[[], object], ...] = (
        run.plan, lambda: processes.read_distributed_config(run), lambda: log_tail(run.path, 1),
    )  # fmt: skip
    for check in checks:  # what the summary doesn't show
        attempt(check, None)
    is_live = any(locks) if state.state == DAMAGED else state.state in LIVE_STATES
    is_current = progress.attempt == state.attempt
    step, evaluated = progress.last(events.Step), progress.last(events.Evaluated)
    heldout_loss = evaluated.heldout_loss if evaluated else None
    if report and report["eval"]:
        heldout_loss = report["eval"]["after"]["loss"]
    stage = progress.stage if is_current else PREPARE
    trains = is_current and state.state == "running" and stage == TRAIN
    return RunSummary(
        name=run.name,
        title=about.get("title") or run.label,
        state=state,
        faults=tuple(faults),
        is_live=is_live,
        model=recipe.model if recipe else "",
        rank=recipe.lora.rank if recipe else None,
        rows=_trained_rows(data),
        stage=DONE if state.state == "finished" else stage,
        seconds=step.tokens / step.tokens_per_second if step and step.tokens_per_second else None,
        step=step.step if step else 0,
        total_steps=step.total_steps if step else None,
        seconds_left=step.seconds_left if step and trains else None,
        loss=step.loss if step else None,
        heldout_loss=heldout_loss,
        phase=progress.phase if is_current else "",
        download=progress.last(events.Download) if is_current else None,
        generated=progress.last(events.Generated) if is_current else None,
    )


def _trained_rows(data: dict[str, Any] | None) -> int | None:
    """Return the number of training rows by `data.json`; None: not known."""
    rows = data["train"].get("rows") if data and isinstance(data.get("train"), dict) else None
    return rows if isinstance(rows, int) else None


def read_progress(run: Run) -> RunProgress:
    """Return the progress by the newest events alone, which costs the same for a long run.

    Raises:
        DamagedRun: `events.jsonl` can't be read, or has no line that can be.
    """
    progress = RunProgress(size=_stamp(run.events_file)[1])
    progress.offset = max(0, progress.size - _TAIL_BYTES)
    newest, end = read_events(run.events_file, progress.offset, _TAIL_BYTES)
    for event in newest:
        progress.update(event)
    if not newest and end > progress.offset:
        raise DamagedRun(run.events_file, _("its newest lines are not events"))
    return progress


def log_tail(folder: Path, size: int) -> str:
    """Return the last bytes of the folder's `log.txt` as text, at most `size`; empty without it.

    Raises:
        DamagedRun: it can't be read.
    """
    path = folder / "log.txt"
    if not os.path.lexists(path):
        return ""
    with contents.open_file(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        text = file.read(size).decode("utf-8", "replace")
    return printable(text.replace("\r\n", "\n").replace("\r", "\n"))


def change_stamp(run: Run) -> list[tuple[int, int]]:
    """Return a value that changes as soon as anything that is shown of the run changes."""
    return [_stamp(run.path / name) for name in _SHOWN_FILES]


def _stamp(path: Path) -> tuple[int, int]:
    """Return the time of the last change in nanoseconds, and the size; zeros without a file."""
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return (stat.st_ctime_ns, stat.st_size)
