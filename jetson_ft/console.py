"""What a run looks like in a terminal: a live line where there is one, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from jetson_ft.paths import printable
from jetson_ft.runs import jobs, processes, sensed
from jetson_ft.runs.report import duration, energy_in_words, rows_of_figures
from jetson_ft.runs.rundir import LIVE, Run, State, read_events

if TYPE_CHECKING:
    from jetson_ft.inference.evaluate import Listener

_POLL_SECONDS = 0.2
_PLAIN_EVERY = 10.0  # seconds between step lines where there is no terminal

out = Console(highlight=False, soft_wrap=True)


class Follower:
    """Prints a run's events as they come, until the run has ended."""

    def __init__(self, run: Run, offset: int = 0) -> None:
        self.run, self.offset = run, offset
        self._heldout: float | None = None
        self._board = ""  # power and heat, where they are known
        self._last_plain = 0.0
        self._bar: TaskID | None = None
        self._what = ""
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), console=out, transient=True,
        )  # fmt: skip

    def follow(self) -> State:
        """Returns the final state."""
        told_queue = ""
        with self._progress:
            while True:
                state = jobs.settle(self.run)
                reason = self.run.state().reason
                if state == "queued" and reason and reason != told_queue:
                    told_queue = reason
                    self._say(f"waiting: {reason}")
                self._print_new()
                if state not in LIVE:
                    break
                time.sleep(_POLL_SECONDS)
            self._print_new()
        return self.run.state()

    def _print_new(self) -> None:
        events, self.offset = read_events(self.run.events_file, self.offset)
        for event in events:
            handler = getattr(self, f"_on_{event['kind']}", None)
            if handler:
                handler(event)

    def _say(self, text: str) -> None:
        out.print(escape(printable(text)))

    # --- one method a kind of event --------------------------------------------------

    def _on_phase(self, event: dict[str, Any]) -> None:
        detail = f": {event['detail']}" if event["detail"] else ""
        if event["name"] not in ("device", "report", "training"):
            self._say(f"{event['name']}{detail}")

    def _on_phase_end(self, event: dict[str, Any]) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None

    def _on_download(self, event: dict[str, Any]) -> None:
        done, total = (event[key] // 10**6 for key in ("done", "total"))
        left = event["seconds_left"]
        note = "MB" + (f"  {duration(left)} left" if left is not None else "")
        self._bar_to(event["file"], done, total, note)
        if self._is_plain_line_due():
            self._say(f"  {event['file']}: {done:,}/{total:,} {note}")

    def _on_device(self, event: dict[str, Any]) -> None:
        device = event["device"]
        self._say(
            f"device: {device['board'] or device['name']}, "
            f"{device['memory_available'] / 2**30:.1f} of "
            f"{device['memory_total'] / 2**30:.1f} GiB free, {event['precision']}"
        )

    def _on_processes(self, event: dict[str, Any]) -> None:
        self._say(
            f"processes: {event['size']} on {', '.join(dict.fromkeys(event['hosts']))}; "
            f"gradients over {event['backend']}"
        )

    def _on_data(self, event: dict[str, Any]) -> None:
        train, heldout = event["train"], event["heldout"]
        self._say(
            f"  {train['rows']:,} rows to learn ({train['tokens']:,} tokens, "
            f"{train['supervised_tokens']:,} supervised), {heldout['rows']:,} held out"
        )
        if train["truncated"] or train["dropped"]:
            dropped = ", ".join(f"{count} {reason}" for reason, count in train["dropped"].items())
            self._say(f"  cut at max_length: {train['truncated']}; dropped: {dropped or 'none'}")
        self._on_read(event["read"])

    def _on_read(self, read: dict[str, Any]) -> None:
        found = read["train"]
        self._say(
            f"  {found['container']}, {found['layout']}, {found['encoding']}: "
            f"{found['rows_read']:,} rows read, {found['duplicates']:,} duplicates; "
            f"held out: {read['heldout_from']}"
        )
        for reason, entry in found["dropped"].items():
            self._say(f"  left out, {reason}: {entry['count']} ({_places(entry, 5)})")
        if read["left_out"]:
            self._say(f"  left out, also in the held-out set: {read['left_out']}")

    def _on_weights(self, event: dict[str, Any]) -> None:
        parts = ", ".join(f"{k} {v / 2**20:,.1f}" for k, v in event["bytes"].items() if v)
        self._say(f"  {sum(event['bytes'].values()) / 2**20:,.1f} MiB: {parts}")

    def _on_plan(self, event: dict[str, Any]) -> None:
        recompute = "recomputing activations" if event["checkpointing"] else "keeping activations"
        tokens = event["micro_batch_tokens"]
        size = f"{tokens:,} tokens" if tokens else "one row"
        shards = event.get("shards", 1)
        self._say(
            f"plan: at most {event['steps_at_most']:,} steps; micro-batches of {size}, {recompute}"
            + (f", layers split among {shards} processes" if shards > 1 else "")
        )
        if event.get("seconds") is not None:  # older runs have no prediction
            self._say(
                f"  predicted: {event['peak_memory_bytes'] / 2**30:.2f} GiB at most, "
                f"{duration(event['seconds'])} of training and measuring"
            )

    def _on_length(self, event: dict[str, Any]) -> None:
        self._say(
            f"  timed: {event['total_steps']:,} steps fit, "
            f"{duration(event['seconds_left'] or 0)} to go"
        )

    def _on_step(self, event: dict[str, Any]) -> None:
        total = event["total_steps"]
        left = event["seconds_left"]
        note = (
            f"loss {_number(event['loss'])}  held-out {_number(self._heldout)}  "
            f"{event['tokens_per_second']:,.0f} tokens/s  {event['memory'] / 2**30:.2f} GiB"
            f"{self._board}  {duration(left) + ' left' if left is not None else 'measuring'}"
        )
        self._bar_to("training", event["step"], total, note)
        if self._is_plain_line_due() or (event["step"] == total and not out.is_terminal):
            self._say(f"step {event['step']}/{total or '?'}  {note}")

    def _on_pause(self, event: dict[str, Any]) -> None:
        self._say(
            f"  pausing after step {event['step']}: {event['temperature'] or 0:.0f} °C, the limit "
            f"is {event['limit']:.0f}; it goes on below {event['until']:.0f}"
        )

    def _on_pause_end(self, event: dict[str, Any]) -> None:
        self._say(f"  paused for {duration(event['seconds'])}")

    def _on_sample(self, event: dict[str, Any]) -> None:
        if "watts" in event and "temperature" in event:
            self._board = f"  {event['watts']:.1f} W  {event['temperature']:.0f} °C"

    def _on_eval(self, event: dict[str, Any]) -> None:
        self._heldout = event["heldout_loss"]
        self._say(
            f"  step {event['step']}: held-out loss {_number(event['heldout_loss'])}, "
            f"{_number(event['bits_per_char'])} bits per character"
        )

    def _on_best(self, event: dict[str, Any]) -> None:
        self._say(f"  the adapter is taken from step {event['step']}, the best on held-out rows")

    def _on_compare(self, event: dict[str, Any]) -> None:
        who = {"before": "replies of the base", "after": "replies of the adapter"}[event["side"]]
        self._bar_to(who, event["done"], event["of"], "")
        if self._is_plain_line_due() or (not out.is_terminal and event["done"] == event["of"]):
            self._say(f"  {who}: {event['done']}/{event['of']}")

    def _on_warning(self, event: dict[str, Any]) -> None:
        self._say(f"warning: {event['message']}")

    def _is_plain_line_due(self) -> bool:
        """Where there is no terminal for a bar, a line now and then."""
        now = time.monotonic()
        if out.is_terminal or now - self._last_plain <= _PLAIN_EVERY:
            return False
        self._last_plain = now
        return True

    def _bar_to(self, what: str, done: int, total: int | None, note: str) -> None:
        if self._bar is None or what != self._what:
            if self._bar is not None:
                self._progress.remove_task(self._bar)
            self._bar, self._what = self._progress.add_task(what, total=total, note=note), what
        self._progress.update(self._bar, completed=done, total=total, note=note)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def print_ending(run: Run, state: State) -> None:
    """Where things are, or what went wrong and how to go on."""
    if state.state == "finished":
        _print_result(run)
        return
    if state.state == "stopped":
        out.print(f"Stopped: {escape(state.reason)}.")
        out.print(f"Go on with: jetson-ft train --resume {escape(str(run.path))}")
        return
    errors = [event for event in run.events() if event["kind"] == "error"]
    last = errors[-1] if errors and errors[-1]["attempt"] == state.attempt else None
    print(f"error: {printable(last['what'] if last else state.reason)}", file=sys.stderr)
    for label in ("where", "fix"):
        if last and last[label]:
            print(f"  {label + ':':6} {printable(last[label])}", file=sys.stderr)
    print(f"  log:   {run.path / 'log.txt'}", file=sys.stderr)


def _print_result(run: Run) -> None:
    from jetson_ft.paths import read_json

    if processes.of(run).node_rank > 0:
        out.print("This machine's part is done; adapter and report are on machine 0.")
        return
    report = read_json(run.path / "report.json")
    print_figures(report)
    train = report["train"]
    out.print(
        f"{train['steps']} steps, {train['tokens']:,} tokens in {duration(train['seconds'])} "
        f"({train['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB{energy_in_words(report)}"
    )
    for english, _ in sensed.complaints(report.get("sensors")):
        out.print(f"note: {english}")
    out.print(f"adapter: {escape(str(run.adapter))}")
    out.print(f"report:  {escape(str(run.path / 'report.html'))}")
    out.print(f"chat:    jetson-ft chat {escape(run.name)}   (or: make chat)")


def print_dry_run(found: Any) -> None:
    """Resolved recipe, rows, tokens and steps."""
    out.print(found.recipe.to_yaml(), markup=False, end="")
    train, heldout = found.rows["train"], found.rows["heldout"]
    out.print("---")
    print_read(found.rows["read"]["train"])
    out.print(f"to learn:  {train['rows']:,} rows, {train['tokens']:,} tokens, "
              f"{train['supervised_tokens']:,} supervised")  # fmt: skip
    out.print(f"held out:  {heldout['rows']:,} rows, {heldout['tokens']:,} tokens "
              f"(from {found.rows['read']['heldout_from']})", markup=False)  # fmt: skip
    out.print(f"cut at max_length: {train['truncated']:,}; dropped: {train['dropped'] or 'none'}")
    limit = ", fewer if train.max_minutes is reached" if found.recipe.train.max_minutes else ""
    out.print(
        f"steps:     {found.steps:,}{limit}; {found.tokens:,} tokens in all, "
        f"{found.rows_per_step:.1f} rows a step"
    )
    _print_forecast(found.forecast)


def _print_forecast(found: Any) -> None:
    """One device's prediction, in a line or two."""
    gib = f"of {found.memory / 2**30:.1f} GiB free"
    if found.plan is None:
        out.print(f"predicted: doesn't fit; {found.least_memory / 2**30:.2f} GiB needed {gib}")
        print_remedies(found)
        return
    plan = found.plan
    recompute = ", recomputing activations" if plan.checkpointing else ""
    out.print(
        f"predicted: about {duration(plan.seconds)} and {plan.peak_memory_bytes / 2**30:.2f} GiB "
        f"{gib}; micro-batches of {plan.micro_batch_tokens:,} tokens{recompute}"
    )


def print_remedies(found: Any) -> None:
    """The settings with which a recipe would fit a device."""
    would = "; ".join(f"{text} ({peak / 2**30:.2f} GiB)" for text, peak in found.remedies)
    would = f"would fit with {would}" if would else "no setting of the recipe makes it fit"
    out.print(f"{found.name}: {would}", markup=False)


def print_outlook(found: Any) -> None:
    """A table with one row a device, what would make the others fit, and the assumptions."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("predicted for", no_wrap=True)
    for column in ("fits", "micro-batch", "recompute", "GiB", "of free", "time"):
        table.add_column(column, justify="right")
    for device in found.devices:
        table.add_row(device.name, *_cells(device))
    out.print(table)
    out.print()
    for device in found.devices:
        if device.plan is None:
            print_remedies(device)
    here = [f"{one.name}: {one.device}, {one.precision}" for one in found.devices if one.is_here]
    for line in [*here, *found.sources, *found.assumptions]:
        out.print(f"- {line}", markup=False)


def _cells(device: Any) -> tuple[str, ...]:
    """A device's cells; where nothing fits, the peak is the least that would do."""
    plan, free = device.plan, f"{device.memory / 2**30:.1f}"
    if plan is None:
        return "no", "–", "–", f"{device.least_memory / 2**30:.2f}", free, "–"
    recompute = "yes" if plan.checkpointing else "no"
    peak = f"{plan.peak_memory_bytes / 2**30:.2f}"
    size = f"{plan.micro_batch_tokens:,}"
    return "yes", size, recompute, peak, free, duration(plan.seconds)


def print_read(found: dict[str, Any]) -> None:
    """What a source held and what became of it."""
    for entry in found["files"]:
        out.print(f"file:      {printable(str(entry['path']))}", markup=False)
    out.print(
        f"format:    {found['container']}, {found['layout']}, {found['encoding'] or 'binary'}"
    )
    out.print(
        f"rows:      {found['rows_read']:,} read, {found['rows_kept']:,} usable, "
        f"{found['duplicates']:,} duplicates"
    )
    for reason, entry in found["dropped"].items():
        places = _places(entry, len(entry["where"]))
        out.print(f"unusable:  {entry['count']:,} {reason} ({places})", markup=False)


def _places(entry: dict[str, Any], at_most: int) -> str:
    """Where the rows of one fault stand; they can be more than are listed."""
    listed = entry["where"][:at_most]
    return ", ".join([*listed, "…"] if entry["count"] > len(listed) else listed)


def print_inspection(found: Any) -> None:
    """The report of `data inspect`, with rows as the model will see them."""
    print_read(found.read)
    count = found.tokens
    out.print(
        f"tokens:    {count['tokens']:,} with the tokenizer of {found.model} "
        f"({count['tokens_per_character']} a character), {count['supervised_tokens']:,} supervised",
        markup=False,
    )
    lengths = ", ".join(f"{name} {value:,}" for name, value in count["lengths"].items())
    share = count["truncated"] / max(1, count["rows"])
    out.print(f"lengths:   {lengths}")
    out.print(f"cut:       {count['truncated']:,} rows ({share:.1%}) at {found.max_length} tokens")
    for reason, number in count["dropped"].items():
        out.print(f"dropped:   {number:,} {reason}")
    for number, row in enumerate(found.previews, 1):
        out.rule(f"row {number} of {len(found.previews)}; what is learnt is marked", align="left")
        for text, learnt in row:
            _print_piece(printable(text), learnt)
        out.print()


def _print_piece(text: str, learnt: bool) -> None:
    if learnt and not out.is_terminal:
        text = f"⟦{text}⟧"
    out.print(text, style="bold green" if learnt else "dim", markup=False, end="")


@contextmanager
def comparison_bar() -> Iterator[Listener]:
    """A progress bar for `inference.evaluate.compare`, and for the model's loading before it."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), console=out, transient=True,
    ) as progress:  # fmt: skip
        task, told = progress.add_task("loading the model", total=None), 0.0
        first = 0, 0.0  # tokens or replies that came first, and when
        if not out.is_terminal:
            out.print("loading the model")

        def update(side: str, part: str, done: int, total: int) -> None:
            nonlocal task, told, first
            who = {"before": "base", "after": "adapter"}[side]
            what = {"tokens": f"measuring the {who}", "replies": f"replies of the {who}"}[part]
            if not done:  # a bar of its own, so that the time left is this part's
                progress.remove_task(task)
                task = progress.add_task(what, total=total)
            if not done or not first[0]:
                first = done, time.monotonic()
            progress.update(task, description=what, completed=done)
            due = done in (0, total) or time.monotonic() - told > _PLAIN_EVERY
            if not out.is_terminal and due:
                told = time.monotonic()
                left = _left(first, done, total, told)
                unit = " tokens" if part == "tokens" else ""
                out.print(f"{what}: {done:,}/{total:,}{unit}{left}" if done else what)

        yield update


def _left(first: tuple[int, float], done: int, total: int, now: float) -> str:
    """Of what `done` of `total` is of, since the first came; nothing while unknown."""
    made = done - first[0]
    if made <= 0 or done == total:
        return ""
    return f", about {duration((total - done) * (now - first[1]) / made)} left"


def print_figures(report: dict[str, Any]) -> None:
    """The before/after table."""
    from rich.table import Table

    table = Table(title=f"{report['eval']['rows']} held-out rows", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("adapter", justify="right")
    colours = {"better": "green", "worse": "red", "same": ""}
    for row in rows_of_figures(report):
        table.add_row(row["en"], row["before"], row["after"], style=colours[row["verdict"]])
    out.print(table)


_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "bold red")}


def print_doctor(coming: Iterable[Any]) -> list[Any]:
    """Prints each of the doctor's findings as it comes; returns all of them."""
    found = []
    for finding in coming:
        found.append(finding)
        show = _show_finding if out.is_terminal else _print_finding
        show(finding)
        if finding.fix():  # no cell of a table: a command that is wrapped can't be copied
            out.print(f"         fix: {finding.fix()}", markup=False)
    counts = Counter(finding.status for finding in found)
    verdict = "Training would not work here" if counts["failure"] else "Training works here"
    out.print(f"{verdict}. Failures: {counts['failure']}, warnings: {counts['warning']}.")
    return found


def _print_finding(finding: Any) -> None:
    text = printable(finding.found())
    out.print(f"{finding.status:8} {finding.title()}: {text}", markup=False)


def _show_finding(finding: Any) -> None:
    """A table's row; each is a table, as the slow ones come long after the others."""
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2))
    row.add_column(width=1)
    row.add_column(width=12)
    row.add_column()
    mark, style = _MARKS[finding.status]
    row.add_row(Text(mark, style=style), finding.title(), Text(printable(finding.found())))
    out.print(row)


@contextmanager
def bench_bar() -> Iterator[Callable[[Any], None]]:
    """A progress bar with the time left, and a line for each arm that has ended."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), console=out, transient=True, refresh_per_second=1,
    ) as progress:  # fmt: skip
        task = progress.add_task("preparing", total=None, note="")

        def update(turn: Any) -> None:
            if turn.measured is not None:
                out.print(f"round {turn.round}  {turn.arm:24} {_measured(turn.measured)}",
                          markup=False)  # fmt: skip
                progress.update(task, completed=turn.number)
                return
            left = turn.seconds_left
            note = "" if left is None else f"about {duration(left)} left"
            what = f"round {turn.round}: {turn.arm}"
            progress.update(
                task, description=what, completed=turn.number - 1, total=turn.of, note=note
            )

        yield update


def _measured(found: dict[str, Any]) -> str:
    """One arm's figures in a few words, or why it has none."""
    if "error" in found:
        return printable(f"failed: {found['error']}")
    peak = found["peak_memory_bytes"]
    memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
    return f"{found['tokens_per_second']:,.0f} tokens/s{memory}"
