"""The table of all runs: their settings and results, and in what they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.i18n import duration
from jetson_ft.runs import monitor
from jetson_ft.runs.monitor import RunSummary
from jetson_ft.runs.store import Run
from jetson_ft.webui import run_texts
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.run_settings import SETTINGS, setting_text

MAX_COMPARED = 6  # runs in one comparison
FIELDS = ("sort", "down", "compared")  # of the page's query
_ALWAYS = ("model", "lora.rank", "train.learning_rate")  # shown even where no run differs


@dataclass(frozen=True)
class Row:
    """What the table shows of a run: values by the columns' keys, without those not known."""

    summary: RunSummary
    values: dict[str, Any]
    has_report: bool


@dataclass(frozen=True)
class Column:
    """A column; of settings, values that differ from most runs' are marked, else the best one."""

    key: str  # of a setting, the recipe's
    title: str
    text: Callable[[Any], str | Message]
    is_setting: bool = False
    is_text: bool = False
    sign: int = 0  # 1: a higher value is better, -1: a lower one, 0: neither


@dataclass(frozen=True)
class Cell:
    """A value as text and its mark: `differs`, `better` or none."""

    text: str
    mark: str


_RESULTS = (
    Column("loss_before", _("Loss before"), "{:.3f}".format),
    Column("loss", _("Held-out loss"), "{:.3f}".format, sign=-1),
    Column("bits_per_char", _("Bits per character"), "{:.3f}".format, sign=-1),
    Column("chrf", "chrF", "{:.1f}".format, sign=1),
    Column("probes", _("General questions"), "{:.0%}".format, sign=1),
    Column("rows", _("Rows"), "{:,.0f}".format),
    Column("seconds", _("Time"), duration),
    Column("tokens", _("Tokens"), "{:,.0f}".format),
    Column("speed", _("Tokens/s"), "{:,.0f}".format),
    Column("memory", _("Memory (GiB)"), "{:.2f}".format),
)


def render_table(
    t: Locale, runs: Sequence[tuple[Run, RunSummary]], query: Mapping[str, str]
) -> str:
    """Return the table of runs.

    Args:
        query: `sort` (a column's key), `down` (1: the largest first), and `compared`, the names of
            the runs that are ticked, with slashes between; any text.
    """
    rows = [_row(run, summary) for run, summary in runs]
    columns = _columns(t, rows)
    sort, is_down = query.get("sort", ""), query.get("down") == "1"
    if sort in ("title", *(column.key for column in columns)):
        rows = _sorted(rows, sort, is_down)
    cells = [_cells(t, column, [row.values.get(column.key) for row in rows]) for column in columns]
    compared = [name for name in query.get("compared", "").split("/") if name]
    reported = [row.summary.name for row in rows if row.has_report]
    return render(
        "runs_table.jinja", t, texts=run_texts, columns=columns, sort=sort, down=is_down,
        rows=list(zip(rows, zip(*cells, strict=True), strict=True)), compared=compared,
        is_full=len(compared) >= MAX_COMPARED,
        comparable=[name for name in compared if name in reported],
    )  # fmt: skip


def _row(run: Run, summary: RunSummary) -> Row:
    values, has_report = _values(run.path, tuple(monitor.change_stamp(run)))
    newest = {} if summary.heldout_loss is None else {"loss": summary.heldout_loss}
    return Row(summary, newest | values, has_report)


@lru_cache(1024)
def _values(path: Path, _stamp: Any) -> tuple[dict[str, Any], bool]:
    """Return a run's values, and whether it has a report; what can't be used is left out.

    Args:
        _stamp: `monitor.change_stamp` of the run, with which its files are read again.
    """
    run, values = Run(path), dict[str, Any]()
    report: dict[str, Any] | None = None
    with suppress(UserError):
        recipe = run.recipe()
        values |= {key: attrgetter(key)(recipe) for key in SETTINGS}
        values["model"] = run_texts.short_model(recipe.model)
    with suppress(UserError):
        report = run.report()
    if report:
        train, evaluated = report["train"], report["eval"] or {}
        before, after = evaluated.get("before", {}), evaluated.get("after", {})
        probes = evaluated.get("probes") or {}
        values |= {
            "seconds": train["seconds"], "tokens": train["tokens"],
            "speed": train["tokens_per_second"], "memory": train["peak_memory_bytes"] / 2**30,
            "loss_before": before.get("loss"), "loss": after.get("loss"),
            "bits_per_char": after.get("bits_per_char"), "chrf": after.get("chrf"),
            "probes": probes.get("after", {}).get("share"),
        }  # fmt: skip
        with suppress(LookupError, TypeError, ValueError):  # not checked when the file is read
            values["rows"] = int(report["data"]["train"]["rows"])
    return {k: v for k, v in values.items() if v is not None}, report is not None


def _columns(t: Locale, rows: Sequence[Row]) -> list[Column]:
    """Return the columns: settings in which runs differ and a few more, then the results."""
    settings = []
    for key, field in SETTINGS.items():
        values = [row.values.get(key) for row in rows if "model" in row.values]
        if key in _ALWAYS or len({*map(repr, values)}) > 1:
            title = field.title or key.rpartition(".")[2]
            is_text = any(isinstance(value, str | list) for value in values)
            settings.append(Column(key, title, partial(setting_text, t), True, is_text))
    return [*settings, *_RESULTS]


def _sorted(rows: Sequence[Row], key: str, is_down: bool) -> list[Row]:
    """Return the rows by a column's values; those without one come last."""

    def value(row: Row) -> tuple[bool, Any]:
        value = row.summary.title.casefold() if key == "title" else row.values[key]
        is_number = isinstance(value, int | float)
        return not is_number, value if is_number else str(value)  # numbers before texts

    known = [row for row in rows if key == "title" or key in row.values]
    unknown = [row for row in rows if row not in known]
    return [*sorted(known, key=value, reverse=is_down), *unknown]


def _cells(t: Locale, column: Column, values: Sequence[Any]) -> list[Cell]:
    """Return a column's cells."""
    known = [value for value in values if value is not None]
    usual = Counter(map(repr, known)).most_common(1)[0][0] if known else ""
    best = max((column.sign * value for value in known), default=0) if column.sign else 0
    cells = []
    for value in values:
        mark = ""
        if value is None:
            cells.append(Cell("–", mark))
            continue
        if column.is_setting and repr(value) != usual:
            mark = "differs"
        elif column.sign and len({*known}) > 1 and column.sign * value == best:
            mark = "better"
        cells.append(Cell(t(column.text(value)), mark))
    return cells
