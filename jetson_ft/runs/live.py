"""What a run is doing and how its figures went: read from its events as they grow, each byte once.

For faces that look at runs again and again; `Run.events` is for whoever looks once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError
from jetson_ft.paths import read_json
from jetson_ft.runs import jobs
from jetson_ft.runs.rundir import LIVE, Run, State, read_events

# What can be drawn: kind of event -> its fields.
CURVES = {
    "step": ("loss", "lr", "grad_norm", "tokens_per_second", "memory"),
    "eval": ("heldout_loss",),
    "sample": ("watts", "temperature"),
}
COOLING = "cooling"
_PIECE = 1 << 22  # bytes read at a time
_TAIL = 1 << 18  # enough for some hundreds of events


class Curve:
    """One figure by step, ascending; a step that is told again takes its new value."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        """After the others, or in the place of the same step."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            return
        place = bisect_left(self.steps, step)
        if self.steps[place] == step:
            self.values[place] = value
        else:
            self.steps.insert(place, step)
            self.values.insert(place, value)

    def points(self, at_most: int = 600) -> list[tuple[int, float]]:
        """The curve in so few points that its lows and highs are still there.

        Of each of `at_most` / 2 equal spans of points, the lowest and the highest.
        """
        count = len(self.steps)
        if count <= at_most:
            return list(zip(self.steps, self.values, strict=True))
        spans = max(1, at_most // 2)
        bounds = [number * count // spans for number in range(spans + 1)]
        return [
            (self.steps[place], self.values[place])
            for start, end in pairwise(bounds)
            for place in _low_and_high(self.values[start:end], start)
        ]


def _low_and_high(values: Sequence[float], start: int) -> list[int]:
    places = range(len(values))
    ends = {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(start + place for place in ends)


@dataclass
class Seen:
    """What a run's events have told so far."""

    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    last: dict[str, dict[str, Any]] = field(default_factory=dict)  # newest event of each kind
    phase: str = ""  # begun and not ended; `COOLING` while training pauses for heat
    offset: int = 0

    def take(self, event: dict[str, Any]) -> None:
        """One more event."""
        kind = event["kind"]
        self.last[kind] = event
        if kind in ("phase", "phase_end"):
            self.phase = event["name"] if kind == "phase" else ""
            self.last.pop("download", None)
        elif kind in ("pause", "pause_end"):
            self.phase = COOLING if kind == "pause" else "training"
        step = event.get("step")
        if kind not in CURVES or not isinstance(step, int):
            return
        for name in CURVES[kind]:
            value = event.get(name)
            if isinstance(value, (int, float)):
                self.curves[name].add(step, value)


class Watcher:
    """Follows the events of runs; one of it serves every visitor of a page."""

    def __init__(self) -> None:
        self._seen: dict[Path, Seen] = {}
        self._summaries: dict[Path, tuple[Any, Summary]] = {}

    def seen(self, run: Run) -> Seen:
        """All that the run's events tell until now."""
        found = self._seen.setdefault(run.path, Seen())
        if _size(run.events_file) < found.offset:  # another run of that name
            found = self._seen[run.path] = Seen()
        while True:
            events, offset = read_events(run.events_file, found.offset, _PIECE)
            if offset == found.offset:
                return found
            found.offset = offset
            for event in events:
                found.take(event)

    def summary(self, run: Run) -> Summary:
        """A line on the run; read again only when one of its files changed.

        Raises:
            UserError: its state can't be read.
        """
        known = self._summaries.get(run.path)
        if known is None or known[1].state.state in LIVE:
            jobs.settle(run)
        now = stamp(run)
        if known and known[0] == now:
            return known[1]
        found = summarise(run)
        self._summaries[run.path] = (now, found)
        return found


ABOUT = "about.json"


@dataclass(frozen=True)
class Summary:
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
    download: dict[str, Any] | None = None  # the newest such event, while it goes on


def summarise(run: Run) -> Summary:
    """Its newest figures, its state and its title."""
    seen = newest(run)
    step, measured = seen.last.get("step", {}), seen.last.get("eval", {})
    return Summary(
        name=run.name,
        title=title(run),
        state=run.state(),
        step=step.get("step", 0),
        total_steps=step.get("total_steps"),
        seconds_left=step.get("seconds_left"),
        loss=step.get("loss"),
        heldout_loss=measured.get("heldout_loss"),
        phase=seen.phase,
        download=seen.last.get("download"),
    )


def newest(run: Run) -> Seen:
    """From the end of its events alone, so that it costs the same for a long run."""
    seen = Seen()
    size = _size(run.events_file)
    events, _ = read_events(run.events_file, max(0, size - _TAIL))
    for event in events:
        seen.take(event)
    return seen


def title(run: Run) -> str:
    """The name that a person gave it, else its folder's."""
    return str(about(run).get("title") or run.name)


def about(run: Run) -> dict[str, Any]:
    """What a person wrote about the run: `title`, `notes`."""
    path = run.path / ABOUT
    try:
        found = read_json(path) if path.exists() else {}
    except UserError:  # a note is no reason to hide a run
        return {}
    return found if isinstance(found, dict) else {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def stamp(run: Run) -> list[tuple[int, int]]:
    """Another one as soon as anything that is shown of the run has changed."""
    files = ("state.json", "events.jsonl", ABOUT, "log.txt", "report.json", "adapter")
    return [_stamp(run.path / name) for name in files]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
