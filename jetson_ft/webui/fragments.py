"""HTML fragments of the runs, rendered from the run directories for all open pages.

Pages poll their fragments. Each is rendered at most once per second, so that ten open pages cost
what one does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError, _
from jetson_ft.events import PHASES, Evaluated, Step
from jetson_ft.runs import jobs, monitor, store
from jetson_ft.runs.monitor import RunMonitor, RunProgress, RunSummary
from jetson_ft.runs.report import chart, figures
from jetson_ft.runs.store import Run
from jetson_ft.webui import after_training
from jetson_ft.webui.after_training import AfterTraining
from jetson_ft.webui.render import Locale, render

_MAX_COMPARED = 5  # runs drawn with the chosen one: the number of colours
_LOG_BYTES = 4000
_CACHE_SECONDS = 1.0
_STATES = {
    "queued": _("queued"), "running": _("running"), "stopping": _("stopping"),
    "stopped": _("stopped"), "finished": _("finished"), "failed": _("failed"),
    "damaged": _("damaged"),
}  # fmt: skip
# Curve -> its title, and the unit that its values are divided by.
_CHARTS = {
    "lr": (_("Learning rate"), 1.0),
    "grad_norm": (_("Gradient norm"), 1.0),
    "tokens_per_second": (_("Tokens per second"), 1.0),
    "memory": (_("Peak memory (GiB)"), 2.0**30),
    "watts": (_("Power (W)"), 1.0),
    "temperature": (_("Temperature (°C)"), 1.0),
}


class _Cached:
    """A fragment: its source, its HTML, when it was last wanted and its source read (monotonic)."""

    def __init__(self) -> None:
        self.lock, self.html = threading.Lock(), ""
        self.wanted_at = self.read_at = -math.inf
        self.source: Any = None


class Fragments:
    """Render fragments of the runs under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._monitor = RunMonitor()
        self._cache: dict[Any, _Cached] = {}
        self._lock = threading.Lock()  # of `_cache`; held for no reading and no rendering

    def run_list(self, language: str, chosen: str, compared: tuple[str, ...]) -> str:
        """Return the list of all runs, newest first."""
        compared = compared[:_MAX_COMPARED]
        return self._cached(
            ("list", language, chosen, compared),
            lambda: [self._monitor.summary(run) for run in store.list_runs(self.root)],
            lambda runs: render(
                "runs.jinja", Locale(language), runs=runs, chosen=chosen, compared=compared,
                STATES=_STATES,
            ),
        )  # fmt: skip

    def run_detail(self, language: str, name: str, compared: tuple[str, ...]) -> str:
        """Return one run's page, the curves of others drawn with its own.

        Raises:
            UserError: the run does not exist.
        """
        runs = [store.run_by_name(name, self.root)]
        for other in compared[:_MAX_COMPARED]:
            with suppress(UserError):  # deleted since it was chosen
                runs.append(store.run_by_name(other, self.root))
        return self._cached(
            ("detail", language, *(run.name for run in runs)),
            # The stamp changes with what the rendering reads by itself: notes, log, report.
            lambda: (
                [
                    (self._monitor.summary(run), self._progress(run), monitor.change_stamp(run))
                    for run in runs
                ]
                + [AfterTraining.read(runs[0])]
            ),
            lambda source: self._detail(Locale(language), runs[0], source[:-1], source[-1]),
        )

    def _cached(self, key: Any, read: Callable[[], Any], to_html: Callable[[Any], str]) -> str:
        """Return HTML: `read` its source at most once per second, `to_html` it when it changed.

        Requests for the same fragment wait for each other, and for no other one.
        """
        with self._lock:
            now = time.monotonic()
            cached = self._cache.setdefault(key, _Cached())
            cached.wanted_at = now
            self._cache = {k: v for k, v in self._cache.items() if now - v.wanted_at < 60}
        with cached.lock:
            if time.monotonic() - cached.read_at > _CACHE_SECONDS:
                source = read()
                if source != cached.source:
                    cached.html = to_html(source)
                cached.source, cached.read_at = source, time.monotonic()
            return cached.html

    def _progress(self, run: Run) -> RunProgress:
        try:
            return self._monitor.progress(run)
        except UserError:  # which is one of the summary's faults
            return RunProgress()

    def _detail(
        self,
        t: Locale,
        run: Run,
        source: Sequence[tuple[RunSummary, RunProgress, Any]],
        after: AfterTraining | None,
    ) -> str:
        summary, newest, _stamp = source[0]
        progresses = [progress for _summary, progress, _stamp in source]
        reading = sum(p.offset for p in progresses) / max(1, sum(p.size for p in progresses))
        if not newest.is_complete:
            with suppress(UserError):
                newest = monitor.read_progress(run)
        is_current = newest.attempt == summary.state.attempt
        log, notes, has_report = "", "", False
        with suppress(OSError):  # a folder of someone else
            has_report = (run.path / "report.html").is_file()
        with suppress(UserError):
            log = monitor.log_tail(run.path, _LOG_BYTES)
        with suppress(UserError):
            notes = run.about().get("notes", "")
        return render(
            "run.jinja", t, STATES=_STATES,
            run=summary, step=newest.last(Step), evaluated=newest.last(Evaluated),
            warnings=newest.warnings if is_current else [],
            names=[other.title for other, _progress, _stamp in source[1:]],
            phase=PHASES.get(summary.phase, summary.phase),
            reading=None if all(p.is_complete for p in progresses) else reading,
            losses=_loss_chart(progresses), charts=_charts(progresses), figures=_figures(run),
            has_report=has_report, has_adapter=run.has_adapter(),
            log=log, notes=notes, after=after, CHOICES=after_training.CHOICES,
            describe_progress=after_training.describe_progress, error_of=jobs.error_of,
            describe_check=after_training.describe_check, size_text=after_training.size_text,
            ollama_command=partial(after_training.ollama_command, run),
            describe_server=after_training.describe_server,
            is_in_container=after_training.is_in_container(),
        )  # fmt: skip


def _loss_chart(progresses: Sequence[RunProgress]) -> str:
    """Draw the losses: each step's of the first run, the running mean and held-out loss of all."""
    series: list[tuple[str, chart.Points]] = []
    for number, progress in enumerate(progresses):
        train, heldout = (
            progress.curves[name].points() if name in progress.curves else []
            for name in ("loss", "heldout_loss")
        )
        if number == 0:
            series.append(("raw", train))
        series += [(f"train c{number}", chart.smoothed(train)), (f"heldout c{number}", heldout)]
    return chart.panel("loss", [(style, points) for style, points in series if points])


def _charts(progresses: Sequence[RunProgress]) -> dict[str, str]:
    """Return the other charts by title, without those that have no values."""
    charts = {}
    for name, (title, unit) in _CHARTS.items():
        series = [
            (f"c{number}", [(x, y / unit) for x, y in progress.curves[name].points()])
            for number, progress in enumerate(progresses)
            if name in progress.curves
        ]
        if svg := chart.panel(name, series, chart.SMALL):
            charts[title] = svg
    return charts


def _figures(run: Run) -> list[dict[str, Any]]:
    """Return the rows of base against adapter; empty unless the run is finished."""
    try:
        return figures.metric_rows(run.report())
    except UserError:
        return []
