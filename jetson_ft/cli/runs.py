"""`jetson-ft runs …`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from jetson_ft.cli.output import RUNS, RunArgument, RunsOption, out, show
from jetson_ft.errors import UserError
from jetson_ft.events import Evaluated
from jetson_ft.files import printable

app = typer.Typer(help="Look at runs.", no_args_is_help=True)


@app.command("list")
def list_all(runs: RunsOption = RUNS) -> None:
    """All runs, newest first."""
    from jetson_ft.runs import store
    from jetson_ft.runs.monitor import RunMonitor

    listed, monitor = store.list_runs(runs), RunMonitor()
    if not listed:
        show(f"No runs in {runs} yet.")
        return
    table = Table("run", "state", "steps", "held-out loss", "model", box=None)
    faults: list[str] = []
    for run in listed:
        summary, losses, model = monitor.summary(run), [], ""
        with suppress(UserError):
            model = run.recipe().model
        with suppress(UserError):
            # A loss that was not finite is null in the events.
            losses = [e.heldout_loss for e in run.iter_events(Evaluated) if e.heldout_loss]
        done = f"{summary.step}/{summary.total_steps or '?'}" if summary.step else "–"
        loss = f"{losses[0]:.3f} → {min(losses):.3f}" if losses else "–"
        states = dict.fromkeys([summary.state.state, *(["damaged"] if summary.faults else [])])
        table.add_row(run.name, ", ".join(states), done, loss, model)
        faults += [f"{run.name}: {fault.what}" for fault in summary.faults]
    out.print(table)
    for fault in faults:
        show(fault)


@app.command("show")
def show_run(run: RunArgument = "latest", runs: RunsOption = RUNS) -> None:
    """State, figures and files of one run."""
    from jetson_ft.cli.export import check_phrase
    from jetson_ft.cli.follow import print_end
    from jetson_ft.runs import exports, store
    from jetson_ft.runs.contents import DamagedRun
    from jetson_ft.runs.monitor import RunMonitor

    shown = store.find_run(run, runs)
    summary = RunMonitor().summary(shown)
    state = summary.state
    show(f"{shown.path}: {state.state}{f' – {state.reason}' if state.reason else ''}")
    for fault in summary.faults:
        show(f"damaged: {fault}")
    if state.state in store.ENDED_STATES:
        with suppress(DamagedRun):  # which is shown already
            print_end(shown, state)
    for entry in exports.list_exports(shown):
        show(f"export: {entry['path']} (check: {check_phrase(entry['check'])})")


@app.command()
def resume(runs: RunsOption = RUNS) -> None:
    """Resume the runs that a power cut or a crash ended (recipe: run.auto_resume).

    The page does so when it starts; this is for a service without a page.
    """
    from jetson_ft.runs.interrupted import take_up_runs

    show("\n".join(take_up_runs(runs)) or f"No run in {runs} was cut short.")


@app.command()
def stop(run: RunArgument = "latest", runs: RunsOption = RUNS) -> None:
    """Ask a run to write a checkpoint and end."""
    from jetson_ft.runs import manager, store
    from jetson_ft.runs.contents import DamagedRun

    stopped = store.find_run(run, runs)
    manager.stop(stopped)
    result = "stop requested" if manager.is_live(stopped) else "nothing to stop"
    try:
        state = stopped.state().state
    except DamagedRun:
        state = "damaged"
    show(f"{stopped.name}: {state}, {result}")


@app.command()
def describe(
    run: RunArgument = "latest",
    title: Annotated[str | None, Option(help="Its name in lists; empty: none.")] = None,
    notes: Annotated[str | None, Option(help="Notes; empty: none.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Give a run a title or notes."""
    from jetson_ft.runs import manager, store

    described = store.find_run(run, runs)
    manager.set_title_and_notes(described, title, notes)
    written = described.about().get("notes", "")
    show(f"{described.name}: {described.title()}\n{written}".rstrip())


@app.command("zip")
def zip_adapter(
    run: RunArgument = "latest",
    file: Annotated[Path | None, Argument(help="By default RUN.zip here.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Put a run's adapter into one file."""
    from jetson_ft.runs import manager, store

    zipped = store.find_run(run, runs)
    show(str(manager.zip_adapter(zipped, file or Path(f"{zipped.name}.zip"))))


@app.command()
def delete(
    run: Annotated[str, Argument(help="Name or path.")],
    yes: Annotated[bool, Option("--yes", help="Don't ask.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Remove an ended run with its checkpoints and adapter."""
    from jetson_ft.runs import manager, store

    deleted = store.find_run(run, runs)
    if not yes:
        question = f"Delete {deleted.path} with its checkpoints and adapter?"
        typer.confirm(printable(question), abort=True)
    manager.delete(deleted)
    show(f"{deleted.name}: deleted")
