"""Progress and curves of runs, updated from their events as the files grow; each byte is read once.

For the page, which reads runs again and again; `Run.events` is for reading a run once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from jetson_ft import events
from jetson_ft.events import Event
from jetson_ft.runs import manager
from jetson_ft.runs.store import LIVE_STATES, E, Run, State, read_events

# The fields that can be drawn, by kind of event.
CURVES: dict[type[Event], tuple[str, ...]] = {
    events.Step: ("loss", "lr", "grad_norm", "tokens_per_second", "memory"),
    events.Evaluated: ("heldout_loss",),
    events.Sensors: ("watts", "temperature"),
}
COOLING = "cooling"
_MAX_WARNINGS = 20  # kept of an attempt, the first ones
_CHUNK_BYTES = 1 << 22
_TAIL_BYTES = 1 << 18  # some hundreds of events


class Curve:
    """A value by step, ascending; a step that is made again takes its new value."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        """Add a value, or replace that of the same step."""
        index = bisect_left(self.steps, step)
        if index < len(self.steps) and self.steps[index] == step:
            self.values[index] = value
        else:
            self.steps.insert(index, step)
            self.values.insert(index, value)

    def points(self, at_most: int = 600) -> list[tuple[int, float]]:
        """Return at most so many points: the lowest and highest of `at_most` / 2 equal spans."""
        points = list(zip(self.steps, self.values, strict=True))
        if len(points) <= at_most:
            return points
        spans = max(1, at_most // 2)
        bounds = [number * len(points) // spans for number in range(spans + 1)]
        chosen = []
        for start, end in pairwise(bounds):
            low, high = (pick(points[start:end], key=itemgetter(1)) for pick in (min, max))
            chosen += sorted({low, high})
        return chosen


@dataclass
class RunProgress:
    """The state of a run's work, by its events so far."""

    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    phase: str = ""  # started and not ended; `COOLING` while training pauses to cool
    attempt: int = 0  # of the newest event
    warnings: list[events.Warned] = field(default_factory=list)  # of the attempt, distinct
    offset: int = 0  # bytes of the events that are read
    _last: dict[type[Event], Event] = field(default_factory=dict)

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
        if isinstance(event, events.PhaseStarted | events.PhaseEnded):
            self.phase = event.name if isinstance(event, events.PhaseStarted) else ""
            self._last.pop(events.Download, None)
        elif isinstance(event, events.Paused | events.PauseEnded):
            self.phase = COOLING if isinstance(event, events.Paused) else "training"
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


class RunMonitor:
    """Follows the events of runs; all clients of a page share one."""

    def __init__(self) -> None:
        self._progress: dict[Path, RunProgress] = {}
        self._summaries: dict[Path, tuple[Any, RunSummary]] = {}

    def progress(self, run: Run) -> RunProgress:
        """Return the run's progress by all its events so far."""
        progress = self._progress.setdefault(run.path, RunProgress())
        if _stamp(run.events_file)[1] < progress.offset:  # another run of that name
            progress = self._progress[run.path] = RunProgress()
        while True:
            chunk, offset = read_events(run.events_file, progress.offset, _CHUNK_BYTES)
            if offset == progress.offset:
                return progress
            progress.offset = offset
            for event in chunk:
                progress.update(event)

    def summary(self, run: Run) -> RunSummary:
        """Return the run's summary; raise `UserError` if its state can't be read."""
        stamp, summary = self._summaries.get(run.path, (None, None))
        if summary is None or summary.state.state in LIVE_STATES:
            manager.reconcile_state(run)
        now = change_stamp(run)
        if summary is None or stamp != now:
            summary = _summarize(run)
            self._summaries[run.path] = (now, summary)
        return summary


@dataclass(frozen=True)
class RunSummary:
    """A run in a list."""

    name: str
    title: str
    state: State
    step: int = 0
    total_steps: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    heldout_loss: float | None = None
    phase: str = ""
    download: events.Download | None = None  # while one goes on


def _summarize(run: Run) -> RunSummary:
    progress = read_progress(run)
    step, evaluated = progress.last(events.Step), progress.last(events.Evaluated)
    figures = ("step", "total_steps", "seconds_left", "loss")
    return RunSummary(
        name=run.name,
        title=run_title(run),
        state=run.state(),
        heldout_loss=evaluated.heldout_loss if evaluated else None,
        phase=progress.phase,
        download=progress.last(events.Download),
        **({name: getattr(step, name) for name in figures} if step else {}),
    )


def read_progress(run: Run) -> RunProgress:
    """Return the progress by the newest events alone, which costs the same for a long run."""
    progress = RunProgress()
    _time, size = _stamp(run.events_file)
    for event in read_events(run.events_file, max(0, size - _TAIL_BYTES))[0]:
        progress.update(event)
    return progress


def run_title(run: Run) -> str:
    """Return the title that a person gave the run, else its folder's name."""
    return str(run.about().get("title") or run.name)


def change_stamp(run: Run) -> list[tuple[int, int]]:
    """Return a value that changes as soon as anything that is shown of the run changes."""
    names = ("state.json", "events.jsonl", "about.json", "log.txt", "report.json", "adapter")
    return [_stamp(run.path / name) for name in names]


def _stamp(path: Path) -> tuple[int, int]:
    """Return the time of the last change in nanoseconds, and the size; zeros without a file."""
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)
