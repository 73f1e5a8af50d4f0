"""The terminal, and the options that several commands have."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.segment import Segment
from rich.text import Text
from typer import Argument, Option

from jetson_ft.child_process import PROGRESS_FILE
from jetson_ft.errors import UserError, _
from jetson_ft.files import printable, replace_unprintable
from jetson_ft.inference.generate import Sampling


class _Console(Console):
    """A console that escapes control characters in all it draws, but for Rich's own."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a string before Rich measures it, and drops some of the characters."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Escape what is left in the parts of other renderables."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


out = _Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
RUNS = Path("runs")
_LINE_SECONDS = 10.0  # between two lines of progress where no bar is drawn
_FILE_SECONDS = 0.5  # between two writes of `PROGRESS_FILE`

SetOption = Annotated[
    list[str] | None,
    Option("--set", "-s", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]
RunsOption = Annotated[Path, Option("--runs", help="Folder that holds the runs.")]
HostNameOption = Annotated[
    list[str] | None,
    Option(
        "--host-name", metavar="NAME", help="Name by which others reach this machine; repeatable."
    ),
]
ReachedAsOption = Annotated[
    str,
    Option(
        metavar="HOST[:PORT]", envvar="JETSON_FT_REACHED_AS",
        help="Address to print, where it isn't this machine's own.",
    ),
]  # fmt: skip
JsonOption = Annotated[bool, Option("--json", help="Print JSON.")]
RECIPE = Argument(help="A recipe file, or the name of a shipped one.")
RecipeArgument = Annotated[str, RECIPE]
RunArgument = Annotated[str, Argument(help="Name, path, or `latest`.")]
TargetArgument = Annotated[
    str,
    Argument(metavar="TARGET", help="A run, `latest`, an adapter's folder, `base` or a model."),
]
BaseOption = Annotated[str | None, Option("--model", help="Base model; by default the run's.")]
QuantizeOption = Annotated[str | None, Option(help="none, int8 or nf4.")]
SystemOption = Annotated[str, Option(help="System message.")]
# An option for each field of `Sampling`, which checks the ranges.
SAMPLING_OPTIONS: dict[str, Any] = {
    f.name: Option(help=f.metadata["help"]) for f in fields(Sampling)
}


def show(text: str, style: str | None = None, end: str = "\n") -> None:
    """Print a text as it is: no markup, control characters escaped."""
    out.print(text, style=style, end=end)


def print_json(data: Any) -> None:
    """Print an object for programs; in ASCII if the output is not in a Unicode encoding.

    Control characters in its texts are escaped as JSON allows it.
    """
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(data, ensure_ascii=not is_unicode, indent=2)
    print(replace_unprintable(text, lambda part: json.dumps(part)[1:-1]))


class ProgressBar(Progress):
    """One bar at a time; its values are also written to `PROGRESS_FILE`, if that is set.

    Args:
        live: draw the bar where there is a terminal.
    """

    def __init__(self, live: bool = True) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            MofNCompleteColumn(), TextColumn("{task.fields[note]}", markup=False), console=out,
            transient=True, disable=not (live and out.is_terminal), refresh_per_second=2,
        )  # fmt: skip
        self._last_line = 0.0
        self._file, self._last_write = os.environ.get(PROGRESS_FILE), 0.0
        self._part, self._since = "", 0.0  # the part of the work, and when it began

    def show(
        self,
        what: str,
        done: int,
        total: int | None,
        note: str = "",
        line: str = "",
        due: bool = False,
    ) -> None:
        """Draw the bar, a new one for a new `what`; without a bar, print the line if it is due.

        A line is due when `due` is set, at the end (`done` is `total`), and every ten seconds.
        """
        if self._file:
            self._write(self._file, what, done, total)
        if not self.disable:
            what, note = printable(what), printable(note)
            if not self.tasks or self.tasks[0].description != what:
                self.clear()
                self.add_task(what, total=total, note=note)
            self.update(self.task_ids[0], completed=done, total=total, note=note)
        elif line:
            now = time.monotonic()
            if due or done == total or now - self._last_line > _LINE_SECONDS:
                self._last_line = now
                show(line)

    def _write(self, path: str, what: str, done: int, total: int | None) -> None:
        """Write what `runs.jobs.Progress` reads; a new part at once, others twice a second."""
        is_new = what != self._part
        if is_new:
            self._part, self._since = what, time.time()
        if is_new or done == total or time.monotonic() - self._last_write > _FILE_SECONDS:
            self._last_write = time.monotonic()
            values = {"what": what, "done": done, "total": total, "since": self._since}
            with suppress(OSError):  # a full disk is no reason to end the work
                temporary = Path(f"{path}.new")  # one writer; not synced: it is soon replaced
                temporary.write_text(json.dumps({"schema": 1, **values}), encoding="utf-8")
                temporary.replace(path)

    def clear(self) -> None:
        """Remove the bar."""
        for task in self.task_ids:
            self.remove_task(task)


@contextmanager
def json_errors(wanted: bool) -> Iterator[None]:
    """Print an error to stdout as JSON too, where `--json` is given; raise it again."""
    try:
        yield
    except Exception as error:
        if wanted:
            print_json({"schema": 1, "error": as_user_error(error).as_json()})
        raise


def as_user_error(error: Exception) -> UserError:
    """Return the error itself, or one that describes a fault of this program."""
    if isinstance(error, UserError):
        return error
    return UserError(
        _("A fault in this program: {error}"),
        fix=_("Report it with the output of `jetson-ft --debug …`."),
        error=f"{type(error).__name__}: {error}",
    )
