"""The result of a run: report.json for programs, report.md and report.html for people."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft import __version__
from jetson_ft.errors import Message, _
from jetson_ft.events import Evaluated, Event, PauseEnded, Sensors, Step, Warned
from jetson_ft.files import printable, printable_value, write_atomic, write_json
from jetson_ft.i18n import duration, languages, translator
from jetson_ft.runs.contents import SCHEMA, DamagedRun
from jetson_ft.runs.curve import Curve
from jetson_ft.runs.event_reader import iter_events
from jetson_ft.runs.report import chart, figures
from jetson_ft.runs.store import Run, short_titles

if TYPE_CHECKING:
    from jetson_ft.training.planner import Plan
    from jetson_ft.training.state import TrainState

_MAX_WARNINGS = 1000  # of a run, distinct ones
_MAX_POINTS = 2000  # of a curve in report.html
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


# By the counter's name in report.json.
_SLOWDOWNS = {
    "throttled_seconds": _(
        "The board lowered its clocks because of heat, for about {count:,.0f} s."
    ),
    "paused_seconds": _("Training paused for {count:,.0f} s to let it cool."),
    "oc1": _("Power: the input voltage fell too low (oc1: {count:,}); this lowers the clocks."),
    "oc2": _("Power: the mean current rose too high (oc2: {count:,}); this lowers the clocks."),
    "oc3": _("Power: the current peaked too high (oc3: {count:,}); this lowers the clocks."),
}
ROLES = {
    "user": _("user"), "assistant": _("assistant"), "system": _("system"), "tool": _("tool"),
    "text": _("beginning of the text"),
}  # fmt: skip


def write_report(run: Run, report: dict[str, Any]) -> None:
    """Write the three reports, from the content of report.json."""
    write_json(run.path / "report.json", report)
    _write_readable(run, report)


def retitle_report(run: Run) -> None:
    """Write `report.md` and `report.html` again with the run's present title.

    They stay as they are where `report.json` is missing or can't be used.
    """
    from jinja2 import TemplateError

    # Not all that the texts need is checked as the file is read.
    with suppress(DamagedRun, TemplateError, LookupError, TypeError, ValueError):
        _write_readable(run, run.report())


def _write_readable(run: Run, report: dict[str, Any]) -> None:
    """Write `report.md` and `report.html`, whose heading is the run's title."""
    (title,), created = short_titles([run]), (run.path / "report.json").stat().st_mtime
    html = render_html(title, report, run.iter_events(Step, Evaluated), created, run.name)
    write_atomic(run.path / "report.md", render_markdown(title, report))
    write_atomic(run.path / "report.html", html)


def build_report(
    run: Run, plan: Plan, state: TrainState, exported_step: int, **parts: Any
) -> dict[str, Any]:
    """Return the content of `report.json` (docs/run-directory.md). Bytes, seconds, tokens.

    Args:
        exported_step: the step whose weights the adapter has.
        parts: the keys that run, plan and state don't give, with their values.
    """
    recipe, losses = run.recipe(), array("d")
    for step in run.iter_events(Step):
        if step.loss is not None:
            losses.append(step.loss)
    # Of all attempts, with the steps that a later attempt has made again.
    peak_memory = max((step.memory for step in iter_events(run.events_file, Step)), default=0)
    last = losses[-max(1, round(len(losses) / 10)) :]
    warnings: dict[str, Any] = {}
    for event in run.iter_events(Warned):
        if len(warnings) < _MAX_WARNINGS:
            warnings[event.message] = event.text
    return {
        "schema": SCHEMA,
        "recipe_sha256": recipe.sha256(),
        "model": recipe.model,
        "versions": versions(),
        "seed": recipe.train.seed,
        **parts,
        "plan": {"peak_memory_bytes": plan.peak_memory_bytes, "seconds": plan.seconds},
        "train": {
            "steps": state.step,
            "best_step": exported_step,
            "stopped_early": state.stopped_early,
            "rows": state.rows,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "seconds": round(state.train_seconds, 1),
            "tokens_per_second": round(state.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory,
            **_energy(state),
            "final_loss": sum(last) / len(last) if last else None,
        },
        "sensors": summarize_sensors(run.iter_events(Sensors, PauseEnded)),
        "warnings": [{"message": message, "text": text} for message, text in warnings.items()],
    }


def _energy(state: TrainState) -> dict[str, float | None]:
    joules, tokens = state.energy_joules, state.tokens
    if joules is None or not tokens:
        return {"energy_joules": None, "joules_per_token": None}
    return {"energy_joules": round(joules, 1), "joules_per_token": round(joules / tokens, 6)}


def versions() -> dict[str, str]:
    """Return the versions of this program and of the packages that affect its results."""
    installed = {"jetson-ft": __version__}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def summarize_sensors(events: Iterable[Event]) -> dict[str, Any] | None:
    """Return `sensors` of report.json, over all attempts; None where nothing was read."""
    # Some of a sample's figures count from the start of an attempt: its last one has the totals.
    last: dict[int, Sensors] = {}
    newest: Sensors | None = None
    max_temperature: float | None = None
    paused_seconds = 0.0
    for event in events:
        if isinstance(event, PauseEnded):
            paused_seconds += event.seconds
        elif isinstance(event, Sensors):
            newest = last[event.attempt] = event
            if event.temperature is not None:
                max_temperature = max(event.temperature, max_temperature or event.temperature)
    if newest is None:
        return None
    counts: Counter[str] = Counter()
    for sample in last.values():
        counts.update(sample.over_current or {})
    return {
        "source": newest.source,
        "max_temperature": max_temperature,
        "throttled_seconds": round(sum(s.throttled_seconds or 0.0 for s in last.values()), 1),
        "over_current": dict(counts),
        "paused_seconds": round(paused_seconds, 1),
    }


def sensor_warnings(sensors: dict[str, Any] | None) -> list[Message]:
    """Return the causes that slowed the board down, by `sensors` of report.json."""
    if sensors is None:
        return []
    counts = sensors | sensors["over_current"]
    return [
        Message(text, {"count": counts[name]})
        for name, text in _SLOWDOWNS.items()
        if counts.get(name)
    ]


def _warnings(report: dict[str, Any]) -> list[Message]:
    emitted = [Message.from_json(warning["text"]) for warning in report["warnings"]]
    return [*sensor_warnings(report["sensors"]), *emitted]


def initial_adapter_note(report: dict[str, Any]) -> list[Message]:
    """Return a sentence on the adapter that the run started from, if it wasn't a new one."""
    source = report.get("initial_adapter")  # not in reports of older runs
    if not source:
        return []
    text = _("Started from the adapter in {path}; `base` is the model without any adapter.")
    if source["run"]:
        text = _(
            "Started from the adapter of {run} at step {step}; `base` is the model without any "
            "adapter."
        )
    return [Message(text, source)]


def _sources(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the training sources, where there are several."""
    sources: list[dict[str, Any]] = report["data"].get("sources", [])
    return sources if len(sources) > 1 else []


def sample_pairs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sample conversations, with the replies of both models.

    `before_ended` and `after_ended` are false where a reply was cut off at `eval.max_new_tokens`.
    """
    if not report["eval"]:
        return []
    before, after = (report["eval"][side]["samples"] for side in ("before", "after"))
    return [
        {
            **old,
            "before": old["reply"],
            "after": new["reply"],
            "before_ended": old.get("ended", True),  # not in reports of older runs
            "after_ended": new.get("ended", True),
        }
        for old, new in zip(before, after, strict=True)
    ]


def render_markdown(title: str, report: dict[str, Any]) -> str:
    """Return the report as text for people."""
    train = report["train"]
    lines = [
        f"# {title}",
        "",
        f"{report['model']} ({report['precision']}), {train['steps']} steps, "
        f"{train['tokens']:,} tokens in {duration(train['seconds'])} "
        f"({train['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {train['peak_memory_bytes'] / 2**30:.2f} GiB, "
        f"{report['device']['board'] or report['device']['name']}{energy_phrase(report)}.",
        *(f"\n{message}" for message in [*initial_adapter_note(report), *_warnings(report)]),
        "",
        *_sources_as_markdown(report),
    ]
    if report["eval"]:
        lines += [*_figures_as_markdown(report), ""]
    for number, pair in enumerate(sample_pairs(report), 1):
        lines += [f"## Pair {number}", ""]
        lines += [_quoted(message["role"], message["content"]) for message in pair["messages"]]
        lines += [_quoted("base", pair["before"]), _quoted("adapter", pair["after"])]
        is_text = pair["messages"][0]["role"] == "text"
        title = "given continuation" if is_text else "given answer"
        lines += [_quoted(title, pair["reference"])]
    return printable("\n".join(lines) + "\n")


def _figures_as_markdown(report: dict[str, Any]) -> list[str]:
    lines = [
        f"| {report['eval']['rows']} held-out rows | base | adapter | difference (95 % interval) |",
        "|---|---:|---:|---|",
    ]
    for row in figures.metric_rows(report):
        lines.append("| {name} | {before} | {after} | {difference} |".format(**row))
    lines += [f"\n{note}" for note in figures.probe_notes(report)]
    if categories := figures.category_rows(report):
        lines += [
            "", "| bits per character | rows | base | adapter | difference (95 % interval) |",
            "|---|---:|---:|---:|---|",
        ]  # fmt: skip
        lines += [
            "| {name} | {rows} | {before} | {after} | {difference} |".format(
                **row | {"name": row["name"].replace("|", "\\|")}
            )
            for row in categories
        ]
    return lines


def _sources_as_markdown(report: dict[str, Any]) -> list[str]:
    rows = [
        "| {name} | {rows_read:,} | {rows:,} | {tokens:,} |".format(**part)
        for part in _sources(report)
    ]
    head = ["| source | rows read | used | tokens |", "|---|---:|---:|---:|"]
    return [*head, *rows, ""] if rows else []


def energy_phrase(report: dict[str, Any]) -> str:
    """Return the end of a sentence on the energy; empty where it wasn't measured."""
    train = report["train"]
    if None in (train.get("energy_joules"), train.get("joules_per_token")):  # as in older runs
        return ""
    return f", {train['energy_joules']:,.0f} J ({train['joules_per_token']:.3g} J/token)"


def _quoted(title: str, text: str) -> str:
    body = "\n".join(f"> {line}" for line in (text or "(nothing)").splitlines())
    return f"**{title}**\n\n{body}\n"


def render_html(
    title: str,
    report: dict[str, Any],
    events: Iterable[Event],
    created: float | None = None,
    name: str = "",
) -> str:
    """Return the report as one page that fetches nothing: no script, font or picture.

    Args:
        events: whose losses are drawn.
        created: when the run was measured, in seconds since 1970; None: now.
        name: the run's, shown where it isn't the title.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=printable_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    train, heldout = Curve(), Curve()
    for event in events:
        if isinstance(event, Step) and event.loss is not None:
            train.add(event.step, event.loss)
        elif isinstance(event, Evaluated) and event.heldout_loss is not None:
            heldout.add(event.step, event.heldout_loss)
    return environment.get_template("report.html.jinja").render(
        _=_in_every_language,
        languages={_html_tag(language): own for language, own in languages().items()},
        title=title,
        name=name if name != title else "",
        report=report,
        train=report["train"],
        metrics=figures.metric_rows(report),
        categories=figures.category_rows(report),
        probe_notes=figures.probe_notes(report),
        pairs=sample_pairs(report),
        sources=_sources(report),
        is_text=figures.is_text(report),
        chart=chart.losses(train.points(_MAX_POINTS), heldout.points(_MAX_POINTS)),
        notes=initial_adapter_note(report),
        warnings=_warnings(report),
        roles=ROLES,
        duration=duration,
        created=time.strftime("%Y-%m-%d %H:%M", time.localtime(created)),
    )


def _in_every_language(text: str | Message, **values: Any) -> Any:
    """Return HTML with the text in each language; the page shows one of them."""
    from markupsafe import Markup

    message = text if isinstance(text, Message) else Message(text, values)
    span = Markup('<span lang="{}">{}</span>')
    return Markup("").join(
        span.format(_html_tag(language), printable(message.format(translator(language))))
        for language in languages()
    )


def _html_tag(language: str) -> str:
    return language.replace("_", "-")  # BCP 47
