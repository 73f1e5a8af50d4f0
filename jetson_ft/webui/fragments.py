"""HTML fragments of the runs, rendered from the run directories for all open pages.

Pages poll their fragments. Each is rendered at most once per second, so that ten open pages cost
what one does.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from jetson_ft.errors import UserError, _
from jetson_ft.runs import exit_status, monitor, oom, queue, store
from jetson_ft.runs.monitor import RunMonitor, RunProgress, RunSummary
from jetson_ft.runs.store import Run
from jetson_ft.webui import run_charts, run_overview, run_table, run_texts, run_views
from jetson_ft.webui.after_training import AfterTraining
from jetson_ft.webui.changed_items import MARK
from jetson_ft.webui.render import Locale, render

MAX_DRAWN = 6  # runs drawn together: the number of colours
_CACHE_SECONDS = 1.0
_KEPT_SECONDS, _MAX_KEPT = 60.0, 100  # a fragment that no page wants, and fragments in all
_T = TypeVar("_T")
VIEWS = {
    "overview": _("Overview"), "samples": _("Samples"), "settings": _("Settings"),
    "charts": _("Charts"), "log": _("Log"), "export": _("Export"),
}  # fmt: skip
SORTS: dict[str, tuple[str, Callable[[RunSummary], Any]]] = {
    "newest": (_("Newest first"), lambda run: 0),  # as `store.list_runs` has them
    "name": (_("Name"), lambda run: (run.title.casefold(), run.name)),
    "loss": (_("Held-out loss"), lambda run: math.inf if run.heldout_loss is None
             else run.heldout_loss),
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    """A run in the list: its summary and its place in the queue, from 1; None: not queued."""

    run: RunSummary
    place: int | None


class _Cached:
    """A fragment: its source, its content, when it was last wanted, its source read (monotonic)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.content: Any = None
        self.wanted_at = self.read_at = -math.inf
        self.source: Any = None


class Fragments:
    """Render fragments of the runs under `root`.

    `drawn` names the runs that are drawn together, each at the place of its colour; an empty name
    is a free colour.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._monitor = RunMonitor()
        self._cache: OrderedDict[Any, _Cached] = OrderedDict()  # the last one was wanted last
        self._lock = threading.Lock()  # of `_cache`; held for no reading and no rendering
        self._expired_at = -math.inf  # monotonic; what was read before is old

    def run_list(
        self, language: str, chosen: str, drawn: tuple[str, ...], sort: str = "", text: str = ""
    ) -> str:
        """Return the list of the runs that contain `text`, in the order `sort` (of `SORTS`)."""
        t, colours = Locale(language), _colours(drawn)
        words = text.casefold().split()
        order = SORTS.get(sort, SORTS["newest"])[1]

        def matches(listed: Listed) -> bool:
            run = listed.run
            state = f"{run.state.state} {t(run_texts.state(run))}"
            texts = f"{run.title} {run.name} {run.model} {state}".casefold()
            return all(word in texts for word in words)

        def read() -> list[Listed]:
            return sorted(filter(matches, self.listed()), key=lambda listed: order(listed.run))

        return self._cached(
            ("list", t.language, chosen, *colours.items(), sort, text),
            read,
            lambda runs: render(
                "runs.jinja", t, runs=runs, chosen=chosen, colours=colours,
                is_filtered=bool(words), sort=sort, SORTS=SORTS, texts=run_texts,
                is_full=len(colours) >= MAX_DRAWN, MARK=MARK,
            ),
        )  # fmt: skip

    def listed(self) -> list[Listed]:
        """Return all runs, newest first; read at most once per second."""

        def read() -> list[Listed]:
            return _with_places([self._monitor.summary(run) for run in store.list_runs(self.root)])

        return self._cached("listed", read, list)

    def run_head(self, language: str, name: str, view: str) -> str:
        """Return the head of one run's page: title, actions, stages and the list of views.

        Raises:
            UserError: the run does not exist.
        """
        run, t = store.run_by_name(name, self.root), Locale(language)

        def read() -> Any:
            (listed,) = _with_places([self._monitor.summary(run)])
            return listed, self._progress(run).stage_seconds, monitor.change_stamp(run)

        def to_html(source: Any) -> str:
            listed, stage_seconds, _stamp = source
            is_failed = listed.run.state.state in ("failed", monitor.DAMAGED)
            about: dict[str, str] = {}
            with suppress(UserError):
                about = run.about()
            return render(
                "run.jinja", t, run=listed.run, listed=listed,
                notes=about.get("notes", ""), given_title=about.get("title", ""),
                stages=run_texts.stages(listed.run, stage_seconds), texts=run_texts,
                VIEWS=VIEWS, view=view, has_adapter=run.has_adapter(),
                has_report=_is_file(run.path / "report.html"),
                error=_last_error(run) if is_failed else None,
                has_smaller_plan=is_failed and bool(oom.smaller_plan_settings(run)),
            )  # fmt: skip

        return self._cached(("head", t.language, run.name, view), read, to_html)

    def run_view(
        self, language: str, name: str, view: str, drawn: tuple[str, ...], query: dict[str, str]
    ) -> str:
        """Return one view of a run (of `VIEWS`); where it compares, with the other drawn runs.

        Args:
            query: what the view itself takes from the address, such as a page's number.

        Raises:
            UserError: the run does not exist.
        """
        chosen = store.run_by_name(name, self.root)
        colours = _colours(drawn)
        others = [run for run in self._runs(colours) if run.name != name]
        runs, t = [chosen, *others], Locale(language)
        key = ("view", t.language, view, *((run.name, colours.get(run.name)) for run in runs))
        if view in ("overview", "charts"):
            return self._cached(
                key,
                # The stamp changes with what the rendering reads by itself: the report.
                lambda: [
                    (self._monitor.summary(run), self._progress(run), monitor.change_stamp(run))
                    for run in runs
                ],
                lambda source: self._drawn(t, view, runs, source, colours),
            )
        if view == "export":
            return self._cached(
                key,
                lambda: (self._monitor.summary(chosen), AfterTraining.read(chosen)),
                lambda source: run_views.render_export(t, chosen, source[1]),
            )
        fields = _chosen_fields(query, run_views.FIELDS[view])
        return self._cached(
            (*key, *fields.items()),
            lambda: [(self._monitor.summary(run), monitor.change_stamp(run)) for run in runs],
            lambda _source: run_views.render_view(t, runs, view, fields),
        )

    def run_table(self, language: str, query: dict[str, str]) -> str:
        """Return the table of all runs."""
        t, fields = Locale(language), _chosen_fields(query, run_table.FIELDS)
        return self._cached(
            ("table", t.language, *fields.items()),
            self.listed,
            lambda listed: run_table.render_table(
                t, [(Run(self.root / each.run.name), each.run) for each in listed], fields
            ),
        )

    def curves(self, view: str, drawn: tuple[str, ...]) -> str:
        """Return the curves of the drawn runs that a view draws, as JSON."""
        colours = _colours(drawn)
        runs = self._runs(colours)
        return self._cached(
            ("curves", view, *((run.name, colours[run.name]) for run in runs)),
            lambda: [(self._monitor.summary(run), self._progress(run)) for run in runs],
            lambda source: run_charts.as_json(view, source, colours),
        )

    def expire(self) -> None:
        """Have all sources read again, after an action of a client has changed a run."""
        self._expired_at = time.monotonic()

    def progress(self, language: str, watched: tuple[str, ...]) -> str:
        """Return what the live runs and the watched ones do, as JSON; for the page's title."""
        t = Locale(language)
        runs = [listed.run for listed in self.listed()]
        content = [
            {"name": run.name, "title": run.title, "is_live": run.is_live,
             "share": run.share, "state": t(run_texts.state(run))}
            for run in runs
            if run.is_live or run.name in watched
        ]  # fmt: skip
        return orjson.dumps(content).decode()

    def _cached(self, key: Any, read: Callable[[], Any], to_content: Callable[[Any], _T]) -> _T:
        """Return content: `read` its source at most once per second, render it when it changed.

        Requests for the same fragment wait for each other, and for no other one.
        """
        with self._lock:
            now = time.monotonic()
            cached = self._cache.setdefault(key, _Cached())
            cached.wanted_at = now
            self._cache.move_to_end(key)
            oldest = next(iter(self._cache.values()))
            while len(self._cache) > _MAX_KEPT or now - oldest.wanted_at > _KEPT_SECONDS:
                self._cache.popitem(last=False)
                oldest = next(iter(self._cache.values()))
        with cached.lock:
            began = time.monotonic()
            if began - cached.read_at > _CACHE_SECONDS or cached.read_at <= self._expired_at:
                source = read()
                if source != cached.source:
                    cached.content = to_content(source)
                # What changed while it was read may be missing in it: it is old at once then.
                read_at = time.monotonic() if began > self._expired_at else -math.inf
                cached.source, cached.read_at = source, read_at
            content: _T = cached.content
            return content

    def _runs(self, names: Iterable[str]) -> list[Run]:
        """Return the runs of these names, without those that have been deleted since."""
        runs = []
        for name in names:
            with suppress(UserError):
                runs.append(store.run_by_name(name, self.root))
        return runs

    def _progress(self, run: Run) -> RunProgress:
        try:
            return self._monitor.progress(run)
        except UserError:  # which is one of the summary's faults
            return RunProgress()

    def _drawn(
        self,
        t: Locale,
        view: str,
        runs: Sequence[Run],
        source: Sequence[tuple[RunSummary, RunProgress, Any]],
        colours: dict[str, int],
    ) -> str:
        """Return the overview or the charts of the first run, drawn with the others."""
        summary, newest, _stamp = source[0]
        progresses = [progress for _summary, progress, _stamp in source]
        reading = sum(p.offset for p in progresses) / max(1, sum(p.size for p in progresses))
        if not newest.is_complete:
            with suppress(UserError):
                newest = monitor.read_progress(runs[0])
        is_current = newest.attempt == summary.state.attempt
        return render(
            "run_overview.jinja" if view == "overview" else "run_charts.jinja", t, run=summary,
            tiles=run_overview.tiles(runs[0], summary, newest) if view == "overview" else [],
            figures=run_overview.measurements(runs[0]) if view == "overview" else [],
            warnings=newest.warnings if is_current else [],
            reading=None if all(p.is_complete for p in progresses) else reading,
            charts=run_charts.charts(view, progresses, t),
            version=sum(progress.offset for progress in progresses),
            names=[(colours.get(other.name, 0), other.title) for other, _p, _s in source],
        )  # fmt: skip


def _colours(drawn: Sequence[str]) -> dict[str, int]:
    """Return the number of each drawn run's colour."""
    return {name: number for number, name in enumerate(drawn[:MAX_DRAWN]) if name}


def _chosen_fields(query: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the fields of these names: a key of the cache with others would have no bound."""
    return {name: query[name] for name in names if name in query}


def _with_places(runs: Sequence[RunSummary]) -> list[Listed]:
    """Return the runs with their places in the queue."""
    waiting: list[int] = []
    if any(run.state.state == "queued" for run in runs):
        with suppress(UserError):  # another user's folder
            waiting = queue.waiting()
    return [
        Listed(run, 1 + sum(since < queue.microseconds(run.state.queued) for since in waiting))
        if run.state.state == "queued" else Listed(run, None)
        for run in runs
    ]  # fmt: skip


def _is_file(path: Path) -> bool:
    with suppress(OSError):  # a folder of someone else
        return path.is_file()
    return False


def _last_error(run: Run) -> UserError | None:
    with suppress(UserError):
        return exit_status.last_error(run)
    return None
