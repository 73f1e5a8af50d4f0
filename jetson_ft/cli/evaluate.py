"""`jetson-ft eval`, and the tables of base and adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Column, Table
from typer import Argument, Option

from jetson_ft.cli.output import RUNS, ProgressBar, RunsOption, out, show
from jetson_ft.files import write_json
from jetson_ft.i18n import duration

if TYPE_CHECKING:
    from jetson_ft.inference.compare import ProgressCallback

SIDES = {"before": "base", "after": "adapter"}
COLOURS = {"better": "green", "worse": "red"}  # by verdict


def evaluate(
    target: Annotated[
        str,
        Argument(
            metavar="TARGET",
            help="A run, `latest`, an adapter's folder, or a model: `base`, a hub id, a folder, "
            "a GGUF file.",
        ),
    ] = "latest",
    data: Annotated[
        str | None,
        Option(help="Rows to use; by default the run's held-out ones, else the bundled ones."),
    ] = None,
    output: Annotated[Path | None, Option(help="Also write the result to this JSON file.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Measure base and adapter, or a model alone, on held-out rows."""
    from jetson_ft.chat.target import resolve_target
    from jetson_ft.runs import store
    from jetson_ft.runs.evaluate import evaluate_model

    if target == "latest":  # for a chat, the newest run with an adapter
        target = str(store.find_run(target, runs).path)
    resolved = resolve_target(target, runs)
    with comparison_bar() as progress:
        report = evaluate_model(resolved.recipe, resolved.adapter_dir, data, progress)
    print_figures(report)
    show(f"measured by {report['reader']}")
    if output:
        write_json(output, report)
        show(f"written: {output}")


@contextmanager
def comparison_bar() -> Iterator[ProgressCallback]:
    """Show the progress of loading the model and of comparing base and adapter."""
    with ProgressBar() as bar:
        bar.show("loading the model", 0, None, line="loading the model", due=True)
        first = 0, 0.0  # of this part: the first count, and when it came
        shown = ""  # the part that the last call was about

        def update(side: str, part: str, done: int, total: int) -> None:
            nonlocal first, shown
            now = time.monotonic()
            # The time left is estimated from this part alone.
            if not done or not first[0]:
                first = done, now
            what = f"{'measuring' if part == 'tokens' else f'{part} of'} the {SIDES[side]}"
            left = ""
            if first[0] < done < total:
                seconds = (total - done) * (now - first[1]) / (done - first[0])
                left = f"about {duration(seconds)} left"
            unit = " tokens" if part == "tokens" else ""
            counted = f"{what}: {done:,}/{total:,}{unit}{left and ', '}{left}"
            is_new, shown = what != shown, what
            bar.show(what, done, total, left, counted if done else what, due=is_new)

        yield update


def print_figures(report: dict[str, Any]) -> None:
    """Print the before/after tables of a report, the probes' result and the speed of replies."""
    from jetson_ft.runs.report import figures

    evaluated = report["eval"]
    _print_table(f"{evaluated['rows']} held-out rows", figures.metric_rows(report))
    if categories := figures.category_rows(report):
        _print_table("bits per character by category", categories)
    for note in figures.probe_notes(report):
        show(str(note))
    for side, name in SIDES.items():
        if speed := (report.get("generation") or {}).get(side):  # not in older runs
            show(
                f"replies of the {name}: {speed['seconds_per_reply']:.2f} s each in batches, "
                f"{speed['tokens_per_second']:.0f} tokens/s"
            )


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    sides = [Column(side, justify="right") for side in SIDES.values()]
    table = Table("", *sides, "difference (95 % interval)", title=title, title_justify="left")
    for row in rows:
        style = COLOURS.get(row["verdict"], "")
        cells = row["name"], row["before"], row["after"], str(row["difference"])
        table.add_row(*cells, style=style)
    out.print(table)
