"""The figures of a run's overview."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import Evaluated, Step
from jetson_ft.runs.monitor import RunProgress, RunSummary
from jetson_ft.runs.report import figures
from jetson_ft.runs.store import Run

_TILES = 4
# Measurements of the report with a tile, the first ones that the report has; with their titles.
_TITLES = {
    "loss": _("Held-out loss"), "bits_per_char": _("Bits per character"),
    "chinese_share": _("Chinese in the replies"), "probes": _("General questions"),
    "stop_rate": _("Ends by itself"), "chrf": "chrF", "rouge_l": "ROUGE-L",
}  # fmt: skip
_CHINESE = 0.05  # share of the replies, from which on their language is worth a tile


@dataclass(frozen=True)
class Tile:
    """A figure with its title; `before` is empty where it is not a comparison."""

    title: str
    value: str
    before: str = ""
    note: Message | None = None
    verdict: str = ""


def measurements(run: Run) -> list[dict[str, Any]]:
    """Return the rows of base against adapter; empty unless the run is finished."""
    try:
        return figures.metric_rows(run.report())
    except UserError:
        return []


def tiles(run: Run, summary: RunSummary, progress: RunProgress) -> list[Tile]:
    """Return four figures: base against adapter of a finished run, else of its training."""
    if summary.state.state == "finished" and (rows := measurements(run)):
        return _compared(run, rows)
    step, evaluated = progress.last(Step), progress.last(Evaluated)
    memory = progress.curves["memory"].values if "memory" in progress.curves else []
    return [
        Tile(_("Training loss"), _format(step.loss if step else None, "{:.3f}")),
        Tile(_("Held-out loss"), _format(evaluated.heldout_loss if evaluated else None, "{:.3f}")),
        Tile(_("Tokens per second"), _format(step.tokens_per_second if step else None, "{:,.0f}")),
        Tile(_("Peak memory"), _format(max(memory) / 2**30 if memory else None, "{:.2f} GiB")),
    ]


def _compared(run: Run, rows: list[dict[str, Any]]) -> list[Tile]:
    by_key = {row["key"]: row for row in rows}
    sides = [run.report()["eval"][side]["chinese_share"] for side in ("before", "after")]
    if max(sides) < _CHINESE:
        by_key.pop("chinese_share", None)
    chosen = [by_key[key] for key in _TITLES if key in by_key][:_TILES]
    return [
        Tile(_TITLES[row["key"]], row["after"], row["before"], row["difference"], row["verdict"])
        for row in chosen
    ]


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
