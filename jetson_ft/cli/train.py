"""`jetson-ft train`: a run followed to its end, or a dry run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from typer import Option

from jetson_ft.cli.output import RECIPE, RUNS, SetOption, json_errors, print_json, show
from jetson_ft.errors import UserError
from jetson_ft.files import quoted

if TYPE_CHECKING:
    from jetson_ft.runs.forecast import DryRun
    from jetson_ft.runs.processes import DistributedConfig
    from jetson_ft.runs.store import Run, State

_EXIT_CODES = {"finished": 0, "stopped": 130, "failed": 2}


def train(
    recipe: Annotated[str | None, RECIPE] = None,
    overrides: SetOption = None,
    resume: Annotated[str | None, Option(metavar="RUN", help="Continue a stopped run.")] = None,
    fork: Annotated[
        str | None,
        Option(metavar="RUN", help="Start a new run from the adapter of a run, with its recipe."),
    ] = None,
    foreground: Annotated[
        bool, Option("--foreground", help="Train in this process, for a debugger.")
    ] = False,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Only show recipe, rows, steps, memory and time."),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="With --dry-run: print JSON.")] = False,
    nproc_per_node: Annotated[
        int | None, Option(help="Processes on this machine (default 1); one per GPU.")
    ] = None,
    nnodes: Annotated[int | None, Option(help="Machines that train together (default 1).")] = None,
    node_rank: Annotated[
        int | None, Option(help="This machine's number; 0 writes checkpoints and report.")
    ] = None,
    rendezvous: Annotated[
        str | None,
        Option(metavar="HOST:PORT", help="Machine 0's address, the same on every machine."),
    ] = None,
    runs: Annotated[
        Path | None, Option("--runs", help="Folder of the runs, in place of output_dir.")
    ] = None,
) -> None:
    """Fine-tune: recipe in, LoRA adapter and before/after report out."""
    from jetson_ft.cli.follow import print_end
    from jetson_ft.cli.recipe import default_recipe
    from jetson_ft.recipe import load_recipe
    from jetson_ft.runs import initial_adapter, manager, processes, store

    distributed = {
        "nproc_per_node": nproc_per_node, "nnodes": nnodes,
        "node_rank": node_rank, "rendezvous": rendezvous,
    }  # fmt: skip
    if fork is not None and (recipe is not None or resume is not None):
        what = "--fork starts from a run's own recipe; it takes neither another nor --resume."
        raise UserError(what, recipe or "--resume", "Remove one of the two.")
    if resume is not None:
        if recipe is not None or dry_run:
            what = "A resumed run keeps its own recipe, and can't be combined with --dry-run."
            raise UserError(what, recipe or "--dry-run", "Remove one of the two.")
        run = store.find_run(resume, runs or RUNS)
        config = processes.read_distributed_config(run).with_options(**distributed)
        start = _start_here(config) if foreground else None
        manager.resume(run, overrides or [], config, start)
    else:
        with json_errors(as_json):
            if fork is not None:
                run = store.find_run(fork, runs or RUNS)
                label = initial_adapter.fork_label(run)
                loaded = initial_adapter.fork_recipe(run, overrides or [])
            elif recipe is None:
                choose = "choose with `jetson-ft train NAME` or make finetune RECIPE=…"
                recipe = default_recipe(choose, as_json)
            if recipe is not None:
                label, loaded = Path(recipe).stem, load_recipe(recipe, overrides or [])
            if runs:
                loaded.output_dir = str(runs)
            if dry_run:
                from jetson_ft.runs import forecast

                result = forecast.dry_run(loaded)
        if dry_run:
            if as_json:
                print_json(result.as_json())
            else:
                print_dry_run(result)
            return
        config = processes.DistributedConfig().with_options(**distributed)
        start = _start_here(config) if foreground else None
        run = manager.launch(loaded, label, config, start)
    if foreground:
        state = run.state()
    else:
        show(f"run: {run.path}")
        state = _follow(run)
    print_end(run, state)
    raise typer.Exit(_EXIT_CODES[state.state])


def _follow(run: Run) -> State:
    """Print the run's events to its end; the first Ctrl-C stops the run, the second exits."""
    from jetson_ft.cli.follow import Follower
    from jetson_ft.runs import manager

    follower = Follower(run)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    try:
        return follower.follow()
    except KeyboardInterrupt:
        manager.stop(run)
        print("\nPress Ctrl-C again to exit; the run still saves its checkpoint")
    try:
        return follower.follow()
    except KeyboardInterrupt:
        print("The run is stopping in the background.")
        show(f"Resume with: jetson-ft train --resume {quoted(str(run.path))}")
        raise typer.Exit(130) from None


def _start_here(config: DistributedConfig) -> Callable[[Run, IO[bytes]], None]:
    """Return a function for `manager.launch` that trains here; a thread prints the events."""
    if config.needs_launcher:
        fix = "Remove --foreground, or --nproc-per-node and --nnodes."
        raise UserError("--foreground trains with one process.", "--foreground", fix)

    def start(run: Run, lock_file: IO[bytes]) -> None:
        from jetson_ft.cli.follow import Follower
        from jetson_ft.runs import manager

        show(f"run: {run.path}")
        # A bar, which is drawn again and again, would disturb a debugger's prompt.
        printer = threading.Thread(target=Follower(run, live=False).follow, daemon=True)
        printer.start()
        manager.run_in_foreground(run, lock_file)
        printer.join()

    return start


def print_dry_run(result: DryRun) -> None:
    """Print the resolved recipe, rows, tokens, steps and the prediction for this machine."""
    from jetson_ft.cli.data import print_rows
    from jetson_ft.cli.recipe import print_coverage, print_devices

    show(f"{result.recipe.to_yaml()}---")
    print_rows(result.rows)
    if result.warning:
        show(f"warning:   {result.warning}")
    limit = ", fewer if train.max_minutes is reached" if result.recipe.train.max_minutes else ""
    show(
        f"steps:     {result.steps:,}{limit}; {result.tokens:,} tokens in all, "
        f"{result.rows_per_step:.1f} rows per step"
    )
    print_coverage(result.coverage)
    print_devices([result.forecast])
