"""The runs as pieces of HTML, the same for every visitor, rebuilt from disk.

A page asks for its pieces again and again. Each is made at most once a second and told apart by
an ETag, so that ten open pages cost what one does, and nothing is sent that hasn't changed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from jetson_ft.errors import UserError
from jetson_ft.paths import read_json
from jetson_ft.runs import chart, live, report, rundir
from jetson_ft.runs.live import Summary, Watcher
from jetson_ft.runs.rundir import LIVE, Run
from jetson_ft.webui.words import Words

_MOST_BESIDE = 5  # runs drawn beside the chosen one: as many as there are colours
_LOG_BYTES = 4000
_FRESH_SECONDS = 1.0
# Curve -> what it is divided by.
_CHARTS = {
    "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0, "memory": 2.0**30, "watts": 1.0,
    "temperature": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """HTML and what tells it apart."""

    html: str
    etag: str


class Pieces:
    """Makes them from a folder of runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._watcher = Watcher()
        self._made: dict[Any, tuple[float, Any, Piece]] = {}  # when and what was looked at
        self._lock = threading.Lock()
        self._templates = Environment(
            loader=PackageLoader("jetson_ft.webui"), trim_blocks=True, lstrip_blocks=True,
            autoescape=select_autoescape(default=True, default_for_string=True),
        )  # fmt: skip

    def shelf(self, language: str, chosen: str, beside: Sequence[str]) -> Piece:
        """All runs, newest first."""
        beside = tuple(beside)[:_MOST_BESIDE]
        return self._fresh(
            ("list", language, chosen, beside),
            self._summaries,
            lambda runs: self._render(
                "runs.jinja", language, runs=runs, chosen=chosen, beside=beside
            ),
        )

    def detail(self, language: str, name: str, beside: Sequence[str]) -> Piece:
        """One run, its curves with those of others beside it.

        Raises:
            UserError: there is no such run.
        """
        run = rundir.named(name, self.root)
        beside = tuple(beside)[:_MOST_BESIDE]
        return self._fresh(
            ("detail", language, name, beside),
            lambda: [self._summary(run), *map(live.stamp, (run, *self._those(beside)))],
            lambda _: self._detail(language, run, beside),
        )

    def _fresh(self, key: Any, look: Callable[[], Any], render: Callable[[Any], str]) -> Piece:
        """Looks at most once a second, and draws only what looks different."""
        with self._lock:
            now = time.monotonic()
            looked_at, seen, piece = self._made.get(key, (0.0, None, None))
            if piece is None or now - looked_at > _FRESH_SECONDS:
                found = look()
                if piece is None or found != seen:
                    html = render(found)
                    piece = Piece(html, f'"{hashlib.sha256(html.encode()).hexdigest()[:24]}"')
                self._made = {k: v for k, v in self._made.items() if now - v[0] < 60}
                self._made[key] = (now, found, piece)
            return piece

    def _render(self, template: str, language: str, **values: Any) -> str:
        words = Words(language)
        return self._templates.get_template(template).render(
            t=words, duration=words.duration, progress=progress, LIVE=LIVE, **values
        )

    def _summaries(self) -> list[Summary]:
        return [self._summary(run) for run in rundir.list_runs(self.root)]

    def _summary(self, run: Run) -> Summary:
        try:
            return self._watcher.summary(run)
        except UserError as error:  # one damaged run must not hide the others
            state = rundir.State("damaged", error.what)
            return Summary(run.name, run.name, state)

    def _detail(self, language: str, run: Run, beside: Sequence[str]) -> str:
        others = self._those(beside)
        seen = [self._watcher.seen(one) for one in (run, *others)]
        summary = self._summary(run)
        return self._render(
            "run.jinja", language,
            run=summary, seen=seen[0], names=[self._summary(o).title for o in others],
            warning=_warning(summary, seen[0]),
            losses=_losses(seen), charts=_charts(seen), figures=_figures(run),
            has_adapter=run.adapter.is_dir(), log=log_tail(run),
            notes=live.about(run).get("notes", ""),
        )  # fmt: skip

    def _those(self, names: Sequence[str]) -> list[Run]:
        """The runs of these names that are still there."""
        found = []
        for name in names:
            with suppress(UserError):
                found.append(rundir.named(name, self.root))
        return found


def progress(run: Summary) -> float:
    """Share of the steps that are made."""
    return min(1.0, run.step / run.total_steps) if run.total_steps else 0.0


def _warning(run: Summary, seen: live.Seen) -> str:
    """The last one of this attempt."""
    told = seen.last.get("warning", {})
    return str(told["message"]) if told.get("attempt") == run.state.attempt else ""


def _losses(seen: Sequence[live.Seen]) -> str:
    """Of one run each step, their running mean and the held-out loss; of several, the last two."""
    own = seen[0].curves
    train = own["loss"].points() if "loss" in own else []
    series: list[tuple[str, chart.Points]] = [("raw", train), ("train c0", chart.smoothed(train))]
    for number, one in enumerate(seen):
        if number and "loss" in one.curves:
            smooth = chart.smoothed(one.curves["loss"].points())
            series.append((f"train c{number}", smooth))
        if "heldout_loss" in one.curves:
            series.append((f"heldout c{number}", one.curves["heldout_loss"].points()))
    return chart.panel("loss", series)


def _charts(seen: Sequence[live.Seen]) -> dict[str, str]:
    drawn = {}
    for name, unit in _CHARTS.items():
        series = [
            (f"c{number}", [(x, y / unit) for x, y in one.curves[name].points()])
            for number, one in enumerate(seen)
            if name in one.curves
        ]
        drawn[name] = chart.panel(name, series, chart.SMALL)
    return {name: svg for name, svg in drawn.items() if svg}


def _figures(run: Run) -> list[dict[str, Any]]:
    """Base against adapter, of a finished run."""
    path = run.path / "report.json"
    try:
        return report.rows_of_figures(read_json(path)) if path.exists() else []
    except (UserError, KeyError, TypeError):
        return []


def log_tail(run: Run) -> str:
    """The last lines that the run's processes printed."""
    path = run.path / "log.txt"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
