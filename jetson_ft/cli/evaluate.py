"""`jetson-ft eval`, and the table of base and adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Column, Table
from typer import Option

from jetson_ft.cli.output import RUNS, ProgressBar, RunArgument, RunsOption, out, show
from jetson_ft.files import write_json
from jetson_ft.i18n import duration

if TYPE_CHECKING:
    from jetson_ft.inference.compare import ProgressCallback

SIDES = {"before": "base", "after": "adapter"}
_COLOURS = {"better": "green", "worse": "red", "same": ""}


def evaluate(
    run: RunArgument = "latest",
    data: Annotated[str | None, Option(help="Rows to use; by default the run's held-out.")] = None,
    output: Annotated[Path | None, Option(help="Also write the result to this JSON file.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Measure base and adapter again, on the held-out rows or on others."""
    from jetson_ft.runs import store
    from jetson_ft.runs.evaluate import evaluate_run

    evaluated = store.find_run(run, runs)
    with comparison_bar() as progress:
        report = evaluate_run(evaluated, data, progress)
    print_figures(report)
    if output:
        write_json(output, report)
        show(f"written: {output}")


@contextmanager
def comparison_bar() -> Iterator[ProgressCallback]:
    """Show the progress of loading the model and of comparing base and adapter."""
    with ProgressBar() as bar:
        bar.show("loading the model", 0, None, line="loading the model", due=True)
        first = 0, 0.0  # of this part: the first count, and when it came

        def update(side: str, part: str, done: int, total: int) -> None:
            nonlocal first
            now = time.monotonic()
            # The time left is estimated from this part alone.
            if not done or not first[0]:
                first = done, now
            what = f"{'measuring' if part == 'tokens' else 'replies of'} the {SIDES[side]}"
            left = ""
            if first[0] < done < total:
                seconds = (total - done) * (now - first[1]) / (done - first[0])
                left = f"about {duration(seconds)} left"
            unit = " tokens" if part == "tokens" else ""
            counted = f"{what}: {done:,}/{total:,}{unit}{left and ', '}{left}"
            bar.show(what, done, total, left, counted if done else what, due=not done)

        yield update


def print_figures(report: dict[str, Any]) -> None:
    """Print the before/after table of a report."""
    from jetson_ft.runs.report.summary import metric_rows

    sides = [Column(side, justify="right") for side in SIDES.values()]
    title = f"{report['eval']['rows']} held-out rows"
    table = Table("", *sides, title=title, title_justify="left")
    for row in metric_rows(report):
        table.add_row(row["name"], row["before"], row["after"], style=_COLOURS[row["verdict"]])
    out.print(table)
