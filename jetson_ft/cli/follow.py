"""A run in the terminal: its events as they come, and its result."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from jetson_ft import events
from jetson_ft.cli.data import print_rows
from jetson_ft.cli.evaluate import SIDES, print_figures
from jetson_ft.cli.output import ProgressBar, show
from jetson_ft.files import printable, quoted
from jetson_ft.i18n import duration
from jetson_ft.runs import exit_status, manager, processes
from jetson_ft.runs.event_reader import offset_of_attempt, read_events
from jetson_ft.runs.report.summary import energy_phrase, sensor_warnings
from jetson_ft.runs.store import LIVE_STATES, Run, State

_POLL_SECONDS = 0.2
_SILENT_PHASES = ("device", "report", "training")


class Follower:
    """Prints the events of a run's attempt as they come, until the run has ended.

    Args:
        live: draw bars where there is a terminal; else, and without one, print plain lines.
    """

    def __init__(self, run: Run, live: bool = True) -> None:
        self.run, self._attempt = run, run.state().attempt
        self._bar = ProgressBar(live)
        self._heldout_loss: float | None = None
        self._board = ""  # power and temperature, once they are known
        # Bytes of events.jsonl that are printed, or of earlier attempts.
        self._offset = offset_of_attempt(run.events_file, self._attempt)

    def follow(self) -> State:
        """Print until the run has ended; return its final state.

        Called again after an interrupt, it continues where it was.
        """
        waiting, stopping = "", False
        with self._bar:
            while True:
                state, reason = manager.reconcile_state(self.run), self.run.state().reason
                if state == "queued" and reason not in ("", waiting):
                    waiting = reason
                    show(f"waiting: {reason}")
                if state in LIVE_STATES and self.run.stop_requested() and not stopping:
                    stopping = True
                    show("stopping: a checkpoint is being written")
                offset = self._offset
                read, self._offset = read_events(self.run.events_file, offset)
                for event in read:
                    if event.attempt >= self._attempt:
                        # A damaged line may lack what is read of an event's dictionaries.
                        with suppress(KeyError, TypeError, ValueError, AttributeError):
                            self.print(event)
                is_end = self._offset == offset
                if state not in LIVE_STATES and is_end:
                    return self.run.state()
                time.sleep(_POLL_SECONDS if state in LIVE_STATES and is_end else 0)

    def print(self, event: events.Event) -> None:
        """Print one event; nothing for kinds that the terminal doesn't show."""
        match event:
            case events.PhaseStarted():
                if event.name not in _SILENT_PHASES:
                    show(f"{event.name}: {event.detail}" if event.detail else event.name)
            case events.PhaseEnded():
                self._bar.clear()
            case events.Download():
                done, total = event.done // 10**6, event.total // 10**6
                note = f"MB  {_left(event.seconds_left)}".rstrip()
                line = f"  {event.file}: {done:,}/{total:,} {note}"
                self._bar.show(event.file, done, total, note, line)
            case events.DeviceDetected():
                device = event.device
                limited = " (limit of this container or service)"
                show(
                    f"device: {device['board'] or device['name']}, "
                    f"{device['memory_available'] / 2**30:.1f} of "
                    f"{device['memory_total'] / 2**30:.1f} GiB free"
                    f"{limited if device.get('memory_limited') else ''}, {event.precision}"
                )
            case events.ProcessesConnected():
                hosts = ", ".join(dict.fromkeys(event.hosts))
                show(f"processes: {event.size} on {hosts}; gradients over {event.backend}")
            case events.DataPrepared():
                rows = {"train": event.train, "heldout": event.heldout, "read": event.read}
                print_rows(rows, notes=False)  # they follow as warnings
            case events.WeightsLoaded():
                parts = ", ".join(f"{k} {v / 2**20:,.1f}" for k, v in event.bytes.items() if v)
                show(f"  {sum(event.bytes.values()) / 2**20:,.1f} MiB: {parts}")
                if event.adapted_share is not None:
                    show(
                        f"  {event.adapter_parameters:,} adapter parameters, beside "
                        f"{event.adapted_share:.1%} of the model's; "
                        f"{event.quantized_share:.1%} quantized"
                    )
            case events.Planned():
                tokens, shards = event.micro_batch_tokens, event.shards
                size = f"{tokens:,} tokens" if tokens else "one row"
                recompute = "recomputing" if event.checkpointing else "keeping"
                split = f", layers split among {shards} processes" if shards > 1 else ""
                show(
                    f"plan: at most {event.steps_at_most:,} steps; "
                    f"micro-batches of {size}, {recompute} activations{split}"
                )
                if event.seconds is not None and event.peak_memory_bytes is not None:
                    show(
                        f"  predicted: {event.peak_memory_bytes / 2**30:.2f} GiB at most, "
                        f"{duration(event.seconds)} of training and measuring, "
                        f"{duration(event.other_seconds or 0)} of loading and comparing"
                    )
            case events.TotalSteps():
                show(f"  timed: {event.total_steps:,} steps fit, {_left(event.seconds_left)}")
            case events.Step():
                steps = event.total_steps
                note = (
                    f"loss {_number(event.loss)}  held-out {_number(self._heldout_loss)}  "
                    f"{event.tokens_per_second:,.0f} tokens/s  {event.memory / 2**30:.2f} GiB"
                    f"{self._board}  {_left(event.seconds_left, 'measuring')}"
                )
                line = f"step {event.step}/{steps or '?'}  {note}"
                self._bar.show("training", event.step, steps, note, line)
            case events.Sensors():
                if event.watts is not None and event.temperature is not None:
                    self._board = f"  {event.watts:.1f} W  {event.temperature:.0f} °C"
            case events.Paused():
                show(
                    f"  pausing after step {event.step}: {event.temperature or 0:.0f} °C, the "
                    f"limit is {event.limit:.0f}; it continues below {event.until:.0f}"
                )
            case events.PauseEnded():
                show(f"  paused for {duration(event.seconds)}")
            case events.Evaluated():
                self._heldout_loss = event.heldout_loss
                show(
                    f"  step {event.step}: held-out loss {_number(event.heldout_loss)}, "
                    f"{_number(event.bits_per_char)} bits per character"
                )
            case events.BestSelected():
                show(f"  the adapter is taken from step {event.step}, the best on held-out rows")
            case events.Generated():
                what = f"{event.part} of the {SIDES[event.side]}"
                line = f"  {what}: {event.done}/{event.total}"
                self._bar.show(what, event.done, event.total, line=line)
            case events.Warned():
                show(f"warning: {event.message}")


def _left(seconds: float | None, unknown: str = "") -> str:
    return unknown if seconds is None else f"{duration(seconds)} left"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def print_end(run: Run, state: State) -> None:
    """Print where the results are, or (to stderr) what went wrong; and how to continue."""
    if state.state == "stopped":
        show(f"Stopped: {state.reason}.")
        show(f"Continue with: jetson-ft train --resume {quoted(str(run.path))}")
    elif state.state == "failed":
        log = run.path / "log.txt"
        text = f"error: {exit_status.last_error(run)}"
        if log.exists():  # a run in the foreground writes to the terminal
            text += f"\n  log:   {log}"
        print(printable(text), file=sys.stderr)
    elif processes.read_distributed_config(run).node_rank > 0:
        show("This machine's part is done; adapter and report are on machine 0.")
    else:
        report = run.report()
        if report["eval"]:
            print_figures(report)
        else:
            show(f"warning: {report.get('comparison_error', 'the comparison failed')}")
        train = report["train"]
        show(
            f"{train['steps']} steps, {train['tokens']:,} tokens in "
            f"{duration(train['seconds'])} ({train['tokens_per_second']:,.0f} tokens/s), "
            f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB{energy_phrase(report)}"
        )
        for message in sensor_warnings(report.get("sensors")):
            show(f"note: {message}")
        show(f"adapter: {run.adapter}")
        show(f"report:  {run.path / 'report.html'}")
        show(f"chat:    jetson-ft chat {quoted(run.name)}   (or: make chat)")
