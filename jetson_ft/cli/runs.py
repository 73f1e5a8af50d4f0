"""`jetson-ft runs …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from typer import Argument, Option

from jetson_ft.cli.output import RUNS, RunArgument, RunsOption, out, show
from jetson_ft.errors import UserError
from jetson_ft.events import Evaluated, Step
from jetson_ft.files import printable

app = typer.Typer(help="Look at runs.", no_args_is_help=True)


@app.command("list")
def list_all(runs: RunsOption = RUNS) -> None:
    """All runs, newest first."""
    from jetson_ft.runs import manager, store

    listed = store.list_runs(runs)
    if not listed:
        show(f"No runs in {runs} yet.")
        return
    table = Table("run", "state", "steps", "held-out loss", "model", box=None)
    for run in listed:
        try:
            state, events, model = manager.reconcile_state(run), run.events(), run.recipe().model
        except UserError as error:  # one damaged run must not hide the others
            table.add_row(run.name, "damaged", "", "", str(error.where))
            continue
        steps = [event for event in events if isinstance(event, Step)]
        # A loss that was not finite is null in the events.
        losses = [e.heldout_loss for e in events if isinstance(e, Evaluated) and e.heldout_loss]
        done = f"{steps[-1].step}/{steps[-1].total_steps or '?'}" if steps else "–"
        loss = f"{losses[0]:.3f} → {min(losses):.3f}" if losses else "–"
        table.add_row(run.name, state, done, loss, model)
    out.print(table)


@app.command("show")
def show_run(run: RunArgument = "latest", runs: RunsOption = RUNS) -> None:
    """State, figures and files of one run."""
    from jetson_ft.cli.follow import print_end
    from jetson_ft.runs import manager, store

    shown = store.find_run(run, runs)
    manager.reconcile_state(shown)
    state = shown.state()
    show(f"{shown.path}: {state.state}{f' – {state.reason}' if state.reason else ''}")
    if state.state in store.ENDED_STATES:
        print_end(shown, state)


@app.command()
def stop(run: RunArgument = "latest", runs: RunsOption = RUNS) -> None:
    """Ask a run to write a checkpoint and end."""
    from jetson_ft.runs import manager, store

    stopped = store.find_run(run, runs)
    manager.stop(stopped)
    state = manager.reconcile_state(stopped)
    result = "stop requested" if state in store.LIVE_STATES else "nothing to stop"
    show(f"{stopped.name}: {state}, {result}")


@app.command()
def describe(
    run: RunArgument = "latest",
    title: Annotated[str | None, Option(help="Its name in lists; empty: none.")] = None,
    notes: Annotated[str | None, Option(help="Notes; empty: none.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Give a run a title or notes."""
    from jetson_ft.runs import manager, monitor, store

    described = store.find_run(run, runs)
    manager.set_title_and_notes(described, title, notes)
    written = described.about().get("notes", "")
    show(f"{described.name}: {monitor.run_title(described)}\n{written}".rstrip())


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
