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
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError, _
from jetson_ft.events import PHASES, Evaluated, Step
from jetson_ft.files import read_json
from jetson_ft.runs import monitor, store
from jetson_ft.runs.monitor import RunMonitor, RunProgress, RunSummary
from jetson_ft.runs.report import chart, summary
from jetson_ft.runs.store import LIVE_STATES, Run
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


class Fragments:
    """Render fragments of the runs under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._monitor = RunMonitor()
        # Key -> when its source was last read (monotonic), the source, its HTML.
        self._cache: dict[Any, tuple[float, Any, str]] = {}
        self._lock = threading.Lock()

    def run_list(self, language: str, chosen: str, compared: tuple[str, ...]) -> str:
        """Return the list of all runs, newest first."""
        compared = compared[:_MAX_COMPARED]
        return self._cached(
            ("list", language, chosen, compared),
            lambda: [self._summary(run) for run in store.list_runs(self.root)],
            lambda runs: render(
                "runs.jinja", Locale(language), runs=runs, chosen=chosen, compared=compared,
                LIVE=LIVE_STATES, STATES=_STATES,
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
            lambda: [self._summary(runs[0]), *map(monitor.change_stamp, runs)],
            lambda source: self._detail(Locale(language), source[0], runs),
        )

    def _cached(self, key: Any, read: Callable[[], Any], to_html: Callable[[Any], str]) -> str:
        """Return HTML: `read` its source at most once per second, `to_html` it when it changed."""
        with self._lock:
            now = time.monotonic()
            read_at, source, html = self._cache.get(key, (-math.inf, None, ""))
            if now - read_at > _CACHE_SECONDS:
                new = read()
                if new != source:
                    html = to_html(new)
                self._cache = {k: v for k, v in self._cache.items() if now - v[0] < 60}
                self._cache[key] = now, new, html
            return html

    def _summary(self, run: Run) -> RunSummary:
        try:
            return self._monitor.summary(run)
        except UserError as error:  # one damaged run must not hide the others
            state = store.State("damaged", str(error.what), error.what.as_json())
            return RunSummary(run.name, run.name, state)

    def _detail(self, t: Locale, summary: RunSummary, runs: Sequence[Run]) -> str:
        run = runs[0]
        progresses = [self._monitor.progress(each) for each in runs]
        last = progresses[0].last
        is_current = progresses[0].attempt == summary.state.attempt
        warnings = progresses[0].warnings if is_current else []
        return render(
            "run.jinja", t, LIVE=LIVE_STATES, STATES=_STATES,
            run=summary, step=last(Step), evaluated=last(Evaluated), warnings=warnings,
            names=[self._summary(other).title for other in runs[1:]],
            phase=PHASES.get(summary.phase, summary.phase),
            losses=_loss_chart(progresses), charts=_charts(progresses), figures=_figures(run),
            has_report=(run.path / "report.html").is_file(), has_adapter=run.adapter.is_dir(),
            log=_log_tail(run), notes=run.about().get("notes", ""),
        )  # fmt: skip


def _loss_chart(progresses: Sequence[RunProgress]) -> str:
    """Draw the losses: each step's of the first run, the running mean and held-out loss of all."""
    series: list[tuple[str, chart.Points]] = []
    for number, progress in enumerate(progresses):
        train, heldout = (progress.curves[name].points() for name in ("loss", "heldout_loss"))
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
    path = run.path / "report.json"
    try:
        return summary.metric_rows(read_json(path)) if path.exists() else []
    except (UserError, KeyError, TypeError):
        return []


def _log_tail(run: Run) -> str:
    path = run.path / "log.txt"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
