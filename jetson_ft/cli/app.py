"""The program: its commands, the root options and how errors are printed; and `webui`."""

from __future__ import annotations

import codecs
import os
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from jetson_ft import __version__, logs
from jetson_ft.cli import (
    bench,
    chat,
    compare,
    data,
    doctor,
    evaluate,
    export,
    inspect,
    models,
    push,
    recipe,
    runs,
    serve,
    train,
)
from jetson_ft.cli.output import (
    RUNS,
    HostNameOption,
    ReachedAsOption,
    RunsOption,
    as_user_error,
)
from jetson_ft.files import printable

app = typer.Typer(
    help="Fine-tune language models with LoRA and QLoRA on NVIDIA Jetson boards and on laptops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in colour takes twice as long to appear
    context_settings={"help_option_names": ["-h", "--help"]},
)


def webui(
    host: Annotated[
        str,
        Option(envvar="JETSON_FT_HOST", help="Address to serve on; other machines need a token."),
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    host_name: HostNameOption = None,
    reached_as: ReachedAsOption = "",
    allow_path: Annotated[
        list[Path] | None,
        Option(
            metavar="FOLDER",
            envvar="JETSON_FT_ALLOW_PATH",
            help="Visitors may use its files, besides runs and uploads; repeatable. "
            "Without --host they may use all that you can read.",
        ),
    ] = None,
    runs: RunsOption = RUNS,
) -> None:
    """Train and watch in a browser."""
    from jetson_ft.webui import server

    server.serve(runs, host, port, tuple(host_name or ()), reached_as, tuple(allow_path or ()))


for command in (
    train.train, recipe.plan, models.models, doctor.doctor, bench.bench, webui, chat.chat,
    compare.compare, export.export, push.push, serve.serve,
):  # fmt: skip
    app.command()(command)
app.command("eval")(evaluate.evaluate)
for group, name in (
    (data.app, "data"), (inspect.app, "inspect"), (recipe.app, "recipe"), (runs.app, "runs"),
):  # fmt: skip
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jetson-ft {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[
        bool, Option("--debug", help="Show tracebacks and log (JETSON_FT_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool,
        Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if debug:
        os.environ[logs.DEBUG] = "1"  # for other processes too
    if logs.is_debug():
        logs.log_to_stderr()
    if not sys.stderr.isatty():  # each redrawing of a bar would be a line of the file
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _tolerate_any_encoding() -> None:
    """Make the standard streams replace what their encodings don't have.

    Else a dash on an ASCII terminal, or a damaged byte in the input, would raise an exception.
    """
    for stream, errors in (
        (sys.stdin, "replace"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace"),
    ):  # fmt: skip
        if isinstance(stream, TextIOWrapper):
            # Without a locale input is decoded as ASCII; its other bytes are most likely UTF-8.
            is_ascii = stream is sys.stdin and codecs.lookup(stream.encoding).name == "ascii"
            encoding = "utf-8" if is_ascii else stream.encoding
            stream.reconfigure(encoding=encoding, errors=errors)


def main() -> None:
    """Run the program; exit with 2 for an error that a person can fix, 1 for a fault of ours."""
    _tolerate_any_encoding()
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if logs.is_debug():
            traceback.print_exception(error)
        user_error = as_user_error(error)
        print(f"error: {printable(str(user_error))}", file=sys.stderr)
        sys.exit(2 if user_error is error else 1)
