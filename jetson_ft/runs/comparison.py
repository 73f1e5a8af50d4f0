"""Two or more finished runs side by side: settings, training, figures, probes, replies.

The first run is the one that the others are compared with. A difference has an interval where both
runs were measured on the same held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError, _
from jetson_ft.files import printable, printable_value
from jetson_ft.i18n import duration
from jetson_ft.inference import metrics
from jetson_ft.inference.probes import summarize_probes
from jetson_ft.runs import heldout
from jetson_ft.runs.report import figures
from jetson_ft.runs.store import Run, short_titles

_SAMPLES = 5


@dataclass(frozen=True)
class Cell:
    """A value of one run, and what it has against the first run."""

    text: str
    verdict: str = ""  # as in `figures.metric_rows`


@dataclass(frozen=True)
class Section:
    """A table with one column for each run."""

    title: str
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Sample:
    """A held-out row, and the reply of each run; None: the run doesn't have the row."""

    prompt: str
    reference: str
    replies: list[str | None]


@dataclass(frozen=True)
class Comparison:
    names: list[str]
    sections: list[Section]
    samples: list[Sample]
    notes: list[str] = field(default_factory=list)


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compare finished runs.

    Raises:
        UserError: less than two runs, or one has no report.
    """
    if len({run.path for run in runs}) < 2:
        raise UserError(_("Two different runs are needed."), fix=_("`jetson-ft runs list`"))
    for run in runs:
        if not (run.path / "report.json").exists():
            raise UserError(
                _("The run {name} has no report yet."), str(run.path),
                _("Wait until it has finished, or continue it with `train --resume`."),
                name=run.name,
            )  # fmt: skip
    reports = [run.report() for run in runs]
    rows = [heldout.read_rows(run) for run in runs]
    identities = [[(row["sha256"], row["reference"]) for row in each] for each in rows]
    comparable = [bool(each) and each == identities[0] for each in identities]
    names, notes = short_titles(runs), []
    first = names[0]
    if not rows[0]:
        notes.append(f"{first} has no heldout.json: nothing can be compared with it row by row.")
    for name, own, same in list(zip(names, rows, comparable, strict=True))[1:]:
        if rows[0] and not own:
            notes.append(f"{name} has no heldout.json: it can't be compared row by row.")
        elif rows[0] and not same:
            notes.append(f"{name} was measured on other held-out rows than {first}: "
                         "no differences.")  # fmt: skip
    sections = [
        Section("Settings that differ", _settings(runs)),
        Section("Training", _training(reports)),
        Section("Held-out rows", _heldout_figures(reports, rows, comparable)),
        Section("General questions", _probes(reports)),
    ]
    return Comparison(
        names, [section for section in sections if section.rows],
        _samples(reports), notes,
    )  # fmt: skip


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    flat = [_flatten(run.recipe().model_dump()) for run in runs]
    return [
        (key, [Cell(str(values.get(key, "–"))) for values in flat])
        for key in flat[0]
        if key != "output_dir" and any(values.get(key) != flat[0][key] for values in flat)
    ]


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            result |= _flatten(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _training(reports: Sequence[dict[str, Any]]) -> list[tuple[str, list[Cell]]]:
    trains = [report["train"] for report in reports]
    shown: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("steps", lambda t: f"{t['steps']:,}"),
        ("best step", lambda t: f"{t['best_step']:,}"),
        ("tokens", lambda t: f"{t['tokens']:,}"),
        ("time", lambda t: str(duration(t["seconds"]))),
        ("tokens/s", lambda t: f"{t['tokens_per_second']:,.0f}"),
        ("peak memory", lambda t: f"{t['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("energy", lambda t: _unit(t.get("energy_joules"), ",.0f", "J")),
        ("energy per token", lambda t: _unit(t.get("joules_per_token"), ".3g", "J")),
    )
    rows = [(name, [show(train) for train in trains]) for name, show in shown]
    return [(name, [Cell(text) for text in texts]) for name, texts in rows if {*texts} != {"–"}]


def _unit(value: float | None, number: str, unit: str) -> str:
    return "–" if value is None else f"{value:{number}} {unit}"


def _heldout_figures(
    reports: Sequence[dict[str, Any]],
    rows: Sequence[list[dict[str, Any]]],
    comparable: Sequence[bool],
) -> list[tuple[str, list[Cell]]]:
    """Return the adapters' figures, with the differences from the first run's."""
    evaluated = [report["eval"] or {} for report in reports]
    intervals: list[dict[str, Any]] = []
    first = metrics.row_statistics(rows[0], "after") if comparable[0] else {}
    for index, (own, same) in enumerate(zip(rows, comparable, strict=True)):
        second = metrics.row_statistics(own, "after") if index and same else None
        intervals.append(metrics.differences(first, second) if second else {})
    table = [
        ("rows", [Cell(str(each.get("rows", "–"))) for each in evaluated]),
        ("Bits per character of the base", [
            Cell(f"{each['before']['bits_per_char']:.3f}" if each else "–") for each in evaluated
        ]),
    ]  # fmt: skip
    for key, name, number, sign in figures.METRICS:
        if key == "probes":
            continue
        values = [each.get("after", {}).get(key) for each in evaluated]
        if not any(value is not None for value in values):
            continue
        cells = [
            _cell(value, values[0], own.get(key), number, sign)
            for value, own in zip(values, intervals, strict=True)
        ]
        table.append((name, cells))
    return table


def _cell(
    value: float | None,
    first: float | None,
    interval: dict[str, Any] | None,
    number: str,
    sign: int,
) -> Cell:
    if value is None:
        return Cell("–")
    if interval is None or first is None:
        return Cell(number.format(value))
    row = figures.compared({"before": first, "after": value}, interval, number, sign)
    return Cell(f"{row['after']}; {row['difference']}", row["verdict"])


def _probes(reports: Sequence[dict[str, Any]]) -> list[tuple[str, list[Cell]]]:
    probes = [(report["eval"] or {}).get("probes") for report in reports]
    if not any(probes):
        return []
    answered, lost = [], []
    for each in probes:
        if not each:
            answered.append(Cell("–"))
            lost.append(Cell("–"))
            continue
        interval = None
        if each is not probes[0] and probes[0] and each["count"] == probes[0]["count"]:
            interval = _probe_difference(probes[0], each)
        share = probes[0]["after"]["share"] if probes[0] else None
        answered.append(_cell(each["after"]["share"], share, interval, "{:.0%}", 1))
        text = f"{len(each['lost'])} lost, {len(each['gained'])} gained"
        lost.append(Cell(text if each["difference"]["clear"] else f"{text}: no clear difference"))
    return [("answered by the adapter", answered), ("against its own base", lost)]


def _probe_difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """Return the difference between the adapters' answers; the count of probes is the same."""
    names = {*first["after"]["correct"], *second["after"]["correct"]}
    names |= {str(number) for number in range(first["count"] - len(names))}  # wrong on both sides
    sides = {
        side: {name: name in each["after"]["correct"] for name in sorted(names)}
        for side, each in (("before", first), ("after", second))
    }
    difference: dict[str, Any] | None = summarize_probes(sides)["difference"]
    return difference


def _samples(reports: Sequence[dict[str, Any]]) -> list[Sample]:
    """Return replies to the first run's sample rows."""
    all_samples = [
        ((report["eval"] or {}).get("after") or {}).get("samples", []) for report in reports
    ]
    samples = []
    for shown in all_samples[0][:_SAMPLES]:
        replies = [
            next((s["reply"] for s in own if s["messages"] == shown["messages"]), None)
            for own in all_samples
        ]
        prompt = "\n".join(str(message["content"]) for message in shown["messages"])
        samples.append(Sample(prompt, shown["reference"], replies))
    return samples


def render_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""

    def row(cells: Sequence[str]) -> str:
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    lines = [f"# {' and '.join(comparison.names)}", "", *(f"{note}\n" for note in comparison.notes)]
    for section in comparison.sections:
        lines += [f"## {section.title}", "", row(["", *comparison.names])]
        lines += [f"|---|{'---|' * len(comparison.names)}"]
        lines += [row([name, *(cell.text for cell in cells)]) for name, cells in section.rows]
        lines.append("")
    for number, sample in enumerate(comparison.samples, 1):
        lines += [f"## Row {number}", "", _quoted("question", sample.prompt)]
        lines += [
            _quoted(name, reply)
            for name, reply in zip(comparison.names, sample.replies, strict=True)
            if reply is not None
        ]
        lines.append(_quoted("given answer", sample.reference))
    return printable("\n".join(lines) + "\n")


def _quoted(title: str, text: str) -> str:
    body = "\n".join(f"> {line}" for line in (text or "(nothing)").splitlines())
    return f"**{title}**\n\n{body}\n"


def render_html(comparison: Comparison) -> str:
    """Return the comparison as one page that fetches nothing."""
    from jinja2 import Environment, FileSystemLoader

    folder = Path(__file__).parent / "report"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, finalize=printable_value,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("comparison.html.jinja").render(comparison=comparison)
