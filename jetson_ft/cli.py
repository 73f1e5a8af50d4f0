"""The command line: thin. Every command calls one function that the page could call too.

Nothing heavy is imported before a command needs it, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jetson_ft import __version__
from jetson_ft.errors import UserError

app = typer.Typer(
    help="Fine-tune language models with LoRA and QLoRA on NVIDIA Jetson boards and on laptops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in colour takes twice as long to appear
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
recipe_app = typer.Typer(help="Look at recipes.", no_args_is_help=True)
runs_app = typer.Typer(help="Look at runs.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(runs_app, name="runs")

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]
RUNS = Path("runs")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"jetson-ft {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["JETSON_FT_DEBUG"] = "1"
    if not sys.stderr.isatty():  # a bar redraws its line, which a file keeps again and again
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a shipped one.")
    ] = None,
    overrides: SetOption = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a stopped run (name or path).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show recipe, rows, steps, memory and time; train nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Processes on this machine (1): one a GPU.")
    ] = None,
    nnodes: Annotated[int | None, typer.Option(help="Machines that train together (1).")] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Number of this machine, from 0, which owns the run.")
    ] = None,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Machine 0's address, for all alike.")
    ] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Fine-tune: recipe in, LoRA adapter and before/after report out."""
    from jetson_ft import recipe as recipes
    from jetson_ft.runs import jobs, processes, rundir

    sets = overrides or []
    given = {
        "nproc_per_node": nproc_per_node, "nnodes": nnodes,
        "node_rank": node_rank, "rendezvous": rendezvous,
    }  # fmt: skip
    if resume:
        _refuse_with_resume(recipe, dry_run)
        run = rundir.find(resume, runs)
        offset = run.events_file.stat().st_size if run.events_file.exists() else 0
        jobs.resume(run, sets, processes.of(run).changed(**given))
    else:
        name = recipe or _chosen()
        loaded = recipes.load(name, sets)
        if dry_run:
            _dry_run(loaded, as_json)
            return
        wanted = processes.Processes().changed(**given)
        run, offset = jobs.launch(loaded, Path(name).stem, wanted), 0
    print(f"run: {run.path}", flush=True)
    raise typer.Exit(_follow(run, offset))


def _refuse_with_resume(recipe: str | None, dry_run: bool) -> None:
    if recipe:
        raise UserError(
            "A resumed run keeps its own recipe.", recipe, "Leave the recipe out, or --resume."
        )
    if dry_run:
        raise UserError(
            "A run can't be resumed dry.", "--dry-run", "`jetson-ft runs show RUN` tells its state."
        )


def _chosen() -> str:
    from jetson_ft.runs.choice import choose_recipe

    name, why = choose_recipe()
    print(f"recipe: {name} ({why}; choose with `jetson-ft train NAME` or make finetune RECIPE=…)")
    return name


def _dry_run(loaded: Any, as_json: bool) -> None:
    from jetson_ft.console import print_dry_run
    from jetson_ft.runs.preview import dry_run

    with _errors_as_json(as_json):
        found = dry_run(loaded)
    if as_json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        print_dry_run(found)


def _follow(run: Any, offset: int) -> int:
    """Follows the run; the first Ctrl-C asks it to stop, the second one only leaves it alone."""
    from jetson_ft.console import Follower, print_ending
    from jetson_ft.runs import jobs

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    follower = Follower(run, offset)
    try:
        state = follower.follow()
    except KeyboardInterrupt:
        jobs.stop(run)
        print("\nstopping: a checkpoint is being written (Ctrl-C again leaves it to itself)")
        try:
            state = follower.follow()
        except KeyboardInterrupt:
            print(f"It ends in the background; then: jetson-ft train --resume {run.path}")
            return 130
    print_ending(run, state)
    if state.state == "finished":
        return 0
    return 130 if state.state == "stopped" else 2


RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]


@app.command()
def plan(
    recipe: RecipeArgument,
    device: Annotated[
        str | None, typer.Option(help="One Orin module, e.g. orin-nx-16gb; by default all of them.")
    ] = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory and time, here and on Orin modules; load nothing."""
    from jetson_ft import recipe as recipes
    from jetson_ft.console import print_outlook
    from jetson_ft.runs.forecast import outlook

    found = outlook(recipes.load(recipe, overrides or []), device)
    if as_json:
        print(json.dumps(found.as_json(), ensure_ascii=False, indent=2))
    else:
        print_outlook(found)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Look at everything that training needs of this machine, and say how to mend what is missing.

    Exits with 1 where training would not work.
    """
    from jetson_ft.console import print_doctor
    from jetson_ft.device import doctor as look

    coming = look.examine(look.Machine(runs=runs))
    if as_json:
        found = list(coming)
        print(json.dumps(look.as_json(found), ensure_ascii=False, indent=2))
    else:
        found = print_doctor(coming)
    raise typer.Exit(0 if look.works(found) else 1)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="`embedded`, a hub id or a folder.")] = "embedded",
    data: Annotated[
        str, typer.Option(help="Rows: `bundled`, a file or a hub data set id.")
    ] = "bundled",
    rows: Annotated[int, typer.Option(min=16, help="Rows an arm trains on, 8 a step.")] = 40,
    max_length: Annotated[int, typer.Option(min=16, help="Longest row in tokens.")] = 512,
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Rank of the adapter.")] = 8,
    precision: Annotated[
        str, typer.Option(help="Arithmetic: fp32, bf16, fp16, or what is fast here.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="How often every arm runs.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads; by default every core.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Arms to run; by default all of them.")
    ] = None,
    llamafactory: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="An interpreter that has LLaMA-Factory, to try it too."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for bench.md, bench.json and the log.")
    ] = None,
) -> None:
    """Compare this program's training with what one would otherwise use, on this machine."""
    from jetson_ft.bench.arms import ARMS
    from jetson_ft.bench.lesson import Settings
    from jetson_ft.bench.run import bench as run_bench
    from jetson_ft.bench.table import markdown
    from jetson_ft.console import bench_bar
    from jetson_ft.device.probe import usable_cores

    chosen = tuple(dict.fromkeys(arms.split(","))) if arms else tuple(ARMS)
    settings = Settings(
        model, data, rows, max_length, rank, rounds, threads or usable_cores(), chosen,
        llamafactory, precision,
    )  # fmt: skip
    folder = output or Path("bench") / time.strftime("%Y%m%d-%H%M%S")
    with bench_bar() as listener:
        found = run_bench(settings, folder, listener)
    print(markdown(found))
    print(f"written: {folder / 'bench.md'}, {folder / 'bench.json'}")
    if all("error" in measured for measured in found["rounds"]):
        raise typer.Exit(1)


@app.command()
def webui(
    host: Annotated[
        str,
        typer.Option(
            envvar="JETSON_FT_HOST",
            help="Address to serve on; beyond this machine a token is needed.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    host_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name by which browsers reach this machine; repeatable."),
    ] = None,
    reached_as: Annotated[
        str,
        typer.Option(
            metavar="HOST[:PORT]",
            envvar="JETSON_FT_REACHED_AS",
            help="What the printed link names, where that isn't --host (in a container).",
        ),
    ] = "",
    runs: RunsOption = RUNS,
) -> None:
    """Train and watch in a browser."""
    from jetson_ft.webui.server import serve

    serve(runs, host, port, tuple(host_name or ()), reached_as)


@app.command()
def chat(
    run: Annotated[
        str,
        typer.Argument(help="A run (name, path, `latest`), adapter folder, `base`, or a model."),
    ] = "latest",
    model: Annotated[
        str | None, typer.Option(help="Base model; by default the one the run was made with.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="none, int8 or nf4.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="With a temperature: likeliest tokens kept.")] = 50,
    top_p: Annotated[float, typer.Option(help="With a temperature: probability kept.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repeats.")] = 1.1,
    seed: Annotated[
        int | None, typer.Option(help="With a temperature: repeatable replies.")
    ] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    examples: Annotated[Path | None, typer.Option(help="Few-shot examples, a JSON file.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Talk with a model in the terminal."""
    from jetson_ft.inference.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    from jetson_ft.chat_terminal import Terminal
    from jetson_ft.inference.chat import read_examples
    from jetson_ft.runs import talk

    found, title = talk.begin(talk.find(run, runs, model, quantize))
    found.system = system
    found.examples = read_examples(examples) if examples else []
    Terminal(found, sampling, title).loop()


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="Name, path, or `latest`.")] = "latest",
    data: Annotated[
        str | None, typer.Option(help="Other rows to measure on; by default the run's held-out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the figures and replies to this JSON file.")
    ] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Measure base and adapter again, on the held-out rows or on others."""
    from jetson_ft.console import comparison_bar, print_figures
    from jetson_ft.paths import write_json
    from jetson_ft.runs import rundir
    from jetson_ft.runs.talk import evaluate_run

    named = rundir.find(run, runs)
    with comparison_bar() as progress:
        found = evaluate_run(named, data, progress)
    print_figures(found)
    if output:
        write_json(output, found)
        print(f"written: {output}")


@data_app.command("inspect")
def data_inspect(
    path: Annotated[str, typer.Argument(help="A file, a hub data set id, or `bundled`.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and template to use.")] = "embedded",
    max_length: Annotated[int, typer.Option(min=16, help="Longest row in tokens.")] = 1024,
    samples: Annotated[int, typer.Option(min=0, help="Rows shown as the model sees them.")] = 3,
    layout: Annotated[
        Literal["auto", "alpaca", "sharegpt", "messages"],
        typer.Option("--format", help="How a row names its parts."),
    ] = "auto",
    encoding: Annotated[str, typer.Option(help="auto, utf-8, gb18030, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is in the data: format, faults, lengths, and rows as the model will see them."""
    from dataclasses import asdict

    from jetson_ft.console import print_inspection
    from jetson_ft.runs.preview import inspect

    with _errors_as_json(as_json):
        found = inspect(path, model, max_length, samples, layout, encoding)
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False, indent=2))
    else:
        print_inspection(found)


@recipe_app.command("list")
def recipe_list() -> None:
    """The shipped recipes, with the first line of each."""
    from jetson_ft import recipe as recipes

    for name, path in recipes.shipped().items():
        print(f"{name:20} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """The resolved recipe, every default written out."""
    from jetson_ft import recipe as recipes

    print(recipes.load(recipe, overrides or []).to_yaml(), end="")


@recipe_app.command("validate")
def recipe_validate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe; every mistake is shown at once, with its line."""
    from jetson_ft import recipe as recipes

    found = recipes.load(recipe, overrides or [])
    print(f"ok: {recipe} (sha256 {found.sha256()[:12]})")


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON schema of recipes, for editors."""
    from jetson_ft import recipe as recipes

    print(recipes.json_schema(), end="")


@runs_app.command("list")
def runs_list(runs: RunsOption = RUNS) -> None:
    """All runs, newest first."""
    from rich.table import Table

    from jetson_ft.console import out
    from jetson_ft.runs import rundir

    found = rundir.list_runs(runs)
    if not found:
        print(f"No runs in {runs} yet.")
        return
    table = Table(box=None)
    for column in ("run", "state", "steps", "held-out loss", "model"):
        table.add_column(column)
    for run in found:
        try:
            table.add_row(*_summary(run))
        except UserError as error:  # one damaged run must not hide the others
            table.add_row(run.name, "damaged", "", "", error.where)
    out.print(table)


def _summary(run: Any) -> tuple[str, ...]:
    """A run's cells in the list."""
    from jetson_ft.runs import jobs

    state = jobs.settle(run)
    events = run.events()
    steps = [event for event in events if event["kind"] == "step"]
    # A loss that was not finite stands as null in the events.
    evals = [e["heldout_loss"] for e in events if e["kind"] == "eval" and e["heldout_loss"]]
    done = f"{steps[-1]['step']}/{steps[-1]['total_steps'] or '?'}" if steps else "–"
    loss = f"{evals[0]:.3f} → {min(evals):.3f}" if evals else "–"
    return run.name, state, done, loss, run.recipe().model


@runs_app.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="Name, path, or `latest`.")] = "latest",
    runs: RunsOption = RUNS,
) -> None:
    """State, figures and places of one run."""
    from jetson_ft.console import print_ending
    from jetson_ft.runs import jobs, rundir

    found = rundir.find(run, runs)
    jobs.settle(found)
    state = found.state()
    print(f"{found.path}: {state.state}{' – ' + state.reason if state.reason else ''}")
    if state.state in ("finished", "stopped", "failed"):
        print_ending(found, state)


@runs_app.command("stop")
def runs_stop(
    run: Annotated[str, typer.Argument(help="Name, path, or `latest`.")] = "latest",
    runs: RunsOption = RUNS,
) -> None:
    """Ask a run to write a checkpoint and end."""
    from jetson_ft.runs import jobs, rundir

    found = rundir.find(run, runs)
    jobs.stop(found)
    state = jobs.settle(found)
    told = "stop requested" if state in rundir.LIVE else "nothing to stop"
    print(f"{found.name}: {state}, {told}")


@runs_app.command("describe")
def runs_describe(
    run: Annotated[str, typer.Argument(help="Name, path, or `latest`.")] = "latest",
    title: Annotated[str | None, typer.Option(help="Its name in lists; empty: none.")] = None,
    notes: Annotated[str | None, typer.Option(help="What to remember; empty: nothing.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Give a run a title or notes."""
    from jetson_ft.runs import live, rundir, shelf

    found = rundir.find(run, runs)
    shelf.describe(found, title, notes)
    told = live.about(found)
    print(f"{found.name}: {live.title(found)}\n{told.get('notes', '')}".rstrip())


@runs_app.command("zip")
def runs_zip(
    run: Annotated[str, typer.Argument(help="Name, path, or `latest`.")] = "latest",
    file: Annotated[Path | None, typer.Argument(help="By default RUN.zip here.")] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Put a run's adapter into one file to take away."""
    from jetson_ft.runs import rundir, shelf

    found = rundir.find(run, runs)
    print(shelf.zip_adapter(found, file or Path(f"{found.name}.zip")))


@runs_app.command("delete")
def runs_delete(
    run: Annotated[str, typer.Argument(help="Name or path.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    runs: RunsOption = RUNS,
) -> None:
    """Remove an ended run with its checkpoints and adapter."""
    from jetson_ft.runs import rundir, shelf

    found = rundir.find(run, runs)
    if not yes:
        typer.confirm(f"Delete {found.path} with its checkpoints and adapter?", abort=True)
    shelf.delete(found)
    print(f"{found.name}: deleted")


def main() -> None:
    """Entry point: plain messages, exit code 2 for what a person can mend and 1 for our faults."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        sys.exit(_tell(error))


@contextmanager
def _errors_as_json(wanted: bool) -> Iterator[None]:
    """For programs: whoever reads JSON finds there why there is none."""
    try:
        yield
    except Exception as error:
        if wanted:
            print(json.dumps({"schema": 1, "error": _plain(error).as_json()}, ensure_ascii=False))
        raise


def _plain(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"A fault in this program: {type(error).__name__}: {error}",
        fix="Report it with what `jetson-ft --debug …` says.",
    )


def _tell(error: Exception) -> int:
    """Prints what went wrong; returns the exit code."""
    from traceback import print_exception

    from jetson_ft.paths import printable

    plain = _plain(error)
    if os.environ.get("JETSON_FT_DEBUG"):
        print_exception(error)
    print(f"error: {printable(str(plain))}", file=sys.stderr)
    return 2 if plain is error else 1


if __name__ == "__main__":
    main()
