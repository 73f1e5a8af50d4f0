"""Texts of a run in the list and in the head of its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from jetson_ft.errors import Message, _
from jetson_ft.events import PHASES
from jetson_ft.i18n import duration
from jetson_ft.models import embedded
from jetson_ft.runs import monitor
from jetson_ft.runs.monitor import RunSummary
from jetson_ft.webui.render import Locale

_STATES = {
    "queued": _("queued"), "running": _("running"), "stopping": _("stopping"),
    "stopped": _("stopped"), "finished": _("finished"), "failed": _("failed"),
    "damaged": _("damaged"),
}  # fmt: skip
_RUNNING = {
    monitor.PREPARE: _("preparing"), monitor.TRAIN: _("training"), monitor.MEASURE: _("measuring"),
}  # fmt: skip
_STAGES = {
    monitor.PREPARE: _("Prepare"), monitor.TRAIN: _("Train"), monitor.MEASURE: _("Measure"),
    monitor.DONE: _("Done"),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage as it is drawn: `state` is `past`, `current`, `ended` (cut short here) or `next`."""

    name: str
    state: str
    time: Message | None


def state(run: RunSummary) -> Message:
    """Return the run's state in a word; of a running one, what it does."""
    if run.state.state == "running":
        if run.phase == monitor.COOLING:
            return Message(_("cooling"))
        return Message(_RUNNING.get(run.stage, _STATES["running"]))
    return Message(_STATES[run.state.state])


def place(number: int) -> Message:
    """Return a place in the queue, from 1, as text."""
    if number == 1:
        return Message(_("next in the queue"))
    return Message(_("place {number} in the queue"), {"number": number})


def facts(run: RunSummary, t: Locale) -> str:
    """Return the list's second line: model, rows, rank, time of the start, time of training."""
    facts = [short_model(run.model)] if run.model else []
    if run.rows is not None:
        facts.append(t(_("{count:,} rows"), count=run.rows))
    if run.rank is not None:
        facts.append(t(_("r {rank}"), rank=run.rank))
    if run.state.created:
        facts.append(started(run, t))
    if run.seconds and run.seconds >= 0.5:
        facts.append(t(rough_duration(run.seconds)))
    return " · ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)


def short_model(name: str) -> str:
    """Return a base model's name without its owner or folder and the usual endings."""
    if name == "embedded":
        name = embedded.NAME
    last = name.rstrip("/").rpartition("/")[2]
    return last.removesuffix("-Instruct").removesuffix("-instruct").removesuffix("-it")


def started(run: RunSummary, t: Locale) -> str:
    """Return when the run was started, by this machine's clock: today's time, or the date."""
    from babel.dates import format_skeleton

    created = datetime.fromtimestamp(run.state.created)
    if created.date() == datetime.now().date():
        return created.strftime("%H:%M")
    skeleton = "MMMd" if created.year == datetime.now().year else "yMMMd"
    return format_skeleton(skeleton, created, locale=t.language)


def rough_duration(seconds: float) -> Message:
    """Return a duration in its largest unit."""
    if seconds < 99.5:
        return duration(seconds) if seconds < 60 else Message(_("{count} min"), {"count": 1})
    if seconds < 99.5 * 60:
        return Message(_("{count} min"), {"count": round(seconds / 60)})
    if seconds < 48 * 3600:
        return Message(_("{hours:g} h"), {"hours": round(seconds / 3600, 1)})
    return Message(_("{days} days"), {"days": round(seconds / 86400)})


def steps(run: RunSummary) -> Message:
    """Return how many steps are made."""
    text = _("step {step:,} of {total:,}") if run.total_steps else _("step {step:,}")
    return Message(text, {"step": run.step, "total": run.total_steps})


def work(run: RunSummary) -> list[Message]:
    """Return what a live run does now, in parts."""
    if not run.is_live:
        return []
    if run.state.state == "stopping":
        return [Message(_("writing a checkpoint"))]
    parts = []
    if run.phase == monitor.COOLING:
        parts.append(Message(_("paused until the device has cooled")))
    if run.stage == monitor.TRAIN and run.step:
        parts.append(steps(run))
    elif run.phase:
        parts.append(Message(PHASES.get(run.phase, run.phase)))
    if run.stage == monitor.MEASURE and run.generated:
        sides = {"before": _("base model"), "after": _("adapter")}
        names = {"replies": _("replies"), "probes": _("general questions")}
        values = {
            "side": Message(sides.get(run.generated.side, "")),
            "part": Message(names.get(run.generated.part, "")),
            "done": run.generated.done, "total": run.generated.total,
        }  # fmt: skip
        parts.append(Message(_("{side}, {part}: {done} of {total}"), values))
    if run.download:
        megabytes = {"done": run.download.done // 10**6, "total": run.download.total // 10**6}
        parts.append(Message(_("{done:,} of {total:,} MB"), megabytes))
    left = run.download.seconds_left if run.download else run.seconds_left
    if left:
        parts.append(Message(_("{time} left"), {"time": duration(left)}))
    return parts


def stages(run: RunSummary, seconds: Mapping[str, float]) -> list[Stage]:
    """Return the stages of a run.

    Args:
        seconds: that the current attempt spent in each.
    """
    times = {**seconds, monitor.TRAIN: run.seconds or 0.0}
    reached = monitor.STAGES.index(run.stage)
    if run.state.state == "queued":
        reached = -1
    drawn = []
    for number, name in enumerate(monitor.STAGES):
        state = "past" if number < reached or run.stage == monitor.DONE else "next"
        if number == reached and state == "next":
            state = "current" if run.is_live else "ended"
        spent = times.get(name, 0.0) if number <= reached else 0.0
        drawn.append(Stage(_STAGES[name], state, rough_duration(spent) if spent >= 0.5 else None))
    return drawn
