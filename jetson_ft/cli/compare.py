"""`jetson-ft compare`: finished runs side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Argument, Option

from jetson_ft.cli.evaluate import COLOURS
from jetson_ft.cli.output import (
    RUNS,
    JsonOption,
    RunsOption,
    json_errors,
    out,
    print_json,
    show,
)
from jetson_ft.files import write_atomic

if TYPE_CHECKING:
    from jetson_ft.runs.comparison import Comparison


def compare(
    names: Annotated[
        list[str], Argument(metavar="RUN RUN …", help="Names or paths; the first is the reference.")
    ],
    html: Annotated[Path | None, Option(help="Also write a page to this file.")] = None,
    markdown: Annotated[Path | None, Option(help="Also write Markdown to this file.")] = None,
    as_json: JsonOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Compare finished runs: settings, training, figures with intervals, replies."""
    with json_errors(as_json):
        from jetson_ft.runs import comparison, store

        compared = comparison.compare_runs([store.find_run(name, runs) for name in names])
        for path, text in (
            (html, comparison.render_html),
            (markdown, comparison.render_markdown),
        ):
            if path:
                write_atomic(path, text(compared))
                if not as_json:
                    show(f"written: {path}")
    if as_json:
        print_json({"schema": 1, **asdict(compared)})
    else:
        _print(compared)


def _print(compared: Comparison) -> None:
    """Print a comparison as tables and replies."""
    for note in compared.notes:
        show(note)
    for section in compared.sections:
        table = Table("", *compared.names, title=section.title, title_justify="left")
        for name, cells in section.rows:
            style = next((COLOURS[c.verdict] for c in cells if c.verdict in COLOURS), "")
            table.add_row(
                name, *(cell.text for cell in cells), style=style if len(cells) == 2 else ""
            )
        out.print(table)
    for number, sample in enumerate(compared.samples, 1):
        show(f"\n{number}. {sample.prompt}")
        for name, reply in zip(compared.names, sample.replies, strict=True):
            show(f"  {name}: {'–' if reply is None else reply}")
        show(f"  given answer: {sample.reference}")
