"""The curves of runs for the browser, which draws them with Chart.js."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import orjson
from fastapi.responses import FileResponse

from jetson_ft.errors import _
from jetson_ft.runs.curve import Curve
from jetson_ft.runs.monitor import RunProgress, RunSummary
from jetson_ft.webui.render import Locale

_POINTS = 1000  # of a curve, at most
# Curve -> its title, and the unit that its values are divided by.
_CURVES = {
    "loss": (_("Loss (nats per token)"), 1.0),
    "heldout_loss": ("", 1.0),  # drawn with the loss
    "lr": (_("Learning rate"), 1.0),
    "grad_norm": (_("Gradient norm"), 1.0),
    "tokens_per_second": (_("Tokens per second"), 1.0),
    "memory": (_("Peak memory (GiB)"), 2.0**30),
    "watts": (_("Power (W)"), 1.0),
    "temperature": (_("Temperature (°C)"), 1.0),
}
_VIEWS: dict[str, tuple[str, ...]] = {"overview": ("loss", "heldout_loss")}
_VIEWS["charts"] = tuple(name for name in _CURVES if name not in _VIEWS["overview"])
_AXES = ("tokens", "seconds")  # curves by which a step is put on another axis


@dataclass(frozen=True)
class Chart:
    """A chart's place on the page, before it is drawn."""

    name: str  # of its first curve
    title: str
    summary: str  # what it shows, for people who can't see it


def charts(view: str, progresses: Sequence[RunProgress], t: Locale) -> list[Chart]:
    """Return the charts of a view that have values."""
    drawn = []
    for name in _VIEWS[view]:
        title, unit = _CURVES[name]
        curves = [progress.curves[name] for progress in progresses if name in progress.curves]
        if title and curves:
            drawn.append(Chart(name, t(title), _summary(curves[0], unit, t)))
    return drawn


def _summary(curve: Curve, unit: float, t: Locale) -> str:
    """Return what a curve does, in a sentence."""
    text = _("From {first:.4g} at step {begin:,} to {last:.4g} at step {end:,}; between {low:.4g} "
             "and {high:.4g}.")  # fmt: skip
    values = [value / unit for value in curve.values]
    return t(
        text, first=values[0], begin=curve.steps[0], last=values[-1], end=curve.steps[-1],
        low=min(values), high=max(values),
    )  # fmt: skip


def as_json(
    view: str,
    runs: Sequence[tuple[RunSummary, RunProgress]],
    colours: Mapping[str, int],
) -> str:
    """Return the curves of a view: of each run its title, its colour and the points by curve.

    A curve is a list of steps and one of values. Runs of the same title have their names instead.
    """
    titles = Counter(summary.title for summary, _progress in runs)
    content = [
        {
            "name": summary.name,
            "title": summary.title if titles[summary.title] == 1 else summary.name,
            "colour": colours[summary.name],
            "curves": {
                name: _points(progress.curves[name], _CURVES[name][1] if name in _CURVES else 1.0)
                for name in (*_VIEWS[view], *_AXES)
                if name in progress.curves
            },
        }
        for summary, progress in runs
    ]
    return orjson.dumps(content).decode()


def _points(curve: Curve, unit: float) -> list[list[float]]:
    points = curve.points(_POINTS)
    return [[x for x, _y in points], [float(f"{y / unit:.5g}") for _x, y in points]]


def library() -> FileResponse:
    """Return Chart.js, from the package `chartkick`."""
    path = files("chartkick").joinpath("django/static/chartkick/Chart.bundle.js")
    headers = {"Cache-Control": "public, max-age=604800"}
    return FileResponse(Path(str(path)), media_type="text/javascript", headers=headers)
