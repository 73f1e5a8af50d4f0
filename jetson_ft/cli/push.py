"""`jetson-ft push`."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.table import Column, Table
from typer import Option

from jetson_ft.cli.output import RUNS, RunArgument, RunsOption, out, show
from jetson_ft.errors import UserError


def push(
    to: Annotated[str, Option(metavar="OWNER/NAME", help="Repository on the Hub.")],
    run: RunArgument = "latest",
    what: Annotated[
        str, Option(help="`adapter`, or an export: its name or its kind (merged, gguf, lora).")
    ] = "adapter",
    public: Annotated[bool, Option("--public", help="Everyone may see it.")] = False,
    yes: Annotated[bool, Option("--yes", help="Don't ask.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Publish a run's adapter or export on the Hub, privately unless --public.

    Shows which files would be sent where, and asks. The access token is HF_TOKEN, or that of
    `hf auth login`.
    """
    from jetson_ft.runs import push as publishing
    from jetson_ft.runs import store

    if not sys.stderr.isatty():  # before the Hub's client is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    plan = publishing.plan_push(store.find_run(run, runs), to, what, public)
    is_new = plan.target.is_private is None
    visibility = "private" if plan.private else "PUBLIC"
    show(f"{plan.what} of {plan.run.name} to {plan.address}")
    show(f"as {plan.target.user}; {visibility}, {'a new' if is_new else 'an existing'} repository")
    table = Table("", Column("", justify="right"), show_header=False, box=None)
    sizes = plan.sizes()
    for name, size in sizes.items():
        table.add_row(name, _size(size))
    table.add_row(f"{len(sizes)} files", _size(sum(sizes.values())))
    out.print(table)
    if plan.left_out:
        show(f"not sent: {', '.join(plan.left_out)}")
    if plan.quotes_rows:
        show("README.md quotes held-out rows of the data.")
    if not yes and not sys.stdin.isatty():
        raise UserError(
            "Nothing was sent: there is no terminal to confirm it.",
            plan.address,
            "Add --yes to send these files without a question.",
        )
    if not yes:
        typer.confirm("Send these files?", abort=True)
    show(f"published: {publishing.push(plan)}")


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
