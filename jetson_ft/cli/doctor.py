"""`jetson-ft doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer
from rich.table import Column, Table
from rich.text import Text

from jetson_ft.cli import output
from jetson_ft.cli.output import RUNS, JsonOption, RunsOption, out, print_json, show

if TYPE_CHECKING:
    from jetson_ft.hardware.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "bold red")}


def doctor(as_json: JsonOption = False, runs: RunsOption = RUNS) -> None:
    """Check everything that training needs of this machine, and how to fix what is missing.

    Exits with 1 where training would not work.
    """
    from jetson_ft.hardware import doctor as checks

    with output.json_errors(as_json):
        findings = checks.examine(checks.Machine(runs=runs))
        done = list(findings) if as_json else print_findings(findings)
    if as_json:
        print_json(checks.as_json(done))
    raise typer.Exit(0 if checks.works(done) else 1)


def print_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Print each of the doctor's findings as it comes, then a verdict; return all of them."""
    done = []
    for finding in findings:
        done.append(finding)
        text = str(finding.text)
        if out.is_terminal:
            # A table for each row: the slow checks end long after the others.
            row = Table.grid(Column(width=1), Column(width=12), Column(), padding=(0, 2))
            mark, style = _MARKS[finding.status]
            row.add_row(Text(mark, style=style), str(finding.title), text)
            out.print(row)
        else:
            show(f"{finding.status:8} {finding.title}: {text}")
        if fix := str(finding.fix):  # outside the table: a wrapped command can't be copied
            show(f"         fix: {fix}")
    counts = Counter(finding.status for finding in done)
    verdict = "Training would not work here" if counts["failure"] else "Training works here"
    show(f"{verdict}. Failures: {counts['failure']}, warnings: {counts['warning']}.")
    return done
