"""The views of a run on the page: samples, settings, log and export.

A view's form (`data-controls`) has what the person chose: the page sends its fields as the query.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.runs import jobs, log_reader, monitor
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.report import summary
from jetson_ft.runs.store import Run, short_titles
from jetson_ft.webui import after_training
from jetson_ft.webui.after_training import AfterTraining
from jetson_ft.webui.render import Locale, error_html, render
from jetson_ft.webui.run_settings import render_settings

# View -> the fields of the page's query that it reads.
FIELDS = {"samples": ("text", "differ", "page"), "settings": ("only",), "log": ("text", "more")}
_PAGE_SAMPLES = 10
_LOG_BYTES = (1 << 16, 1 << 18, 1 << 20)  # shown of a log: at first, and after each `earlier`
_MAX_MATCHES = 500  # lines shown of a search
_MAX_SEARCH = 200  # characters


def render_view(t: Locale, runs: Sequence[Run], view: str, query: Mapping[str, str]) -> str:
    """Return the HTML of a run's view; what is damaged is named in its place.

    Args:
        runs: the run, then those that it is compared with.
        view: `samples`, `settings` or `log`.
        query: the fields of the view's form; any text.
    """
    views: dict[str, Callable[[Locale, Sequence[Run], Mapping[str, str]], str]] = {
        "samples": _samples, "settings": render_settings, "log": _log,
    }  # fmt: skip
    try:
        return views[view](t, runs, query)
    except UserError as error:
        return error_html(error, t)


# --- samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A model's reply to a held-out prompt."""

    title: str  # of the run; empty: of the base
    text: str
    ended: bool  # by itself, not at the limit of tokens


def _samples(t: Locale, runs: Sequence[Run], query: Mapping[str, str]) -> str:
    report, titles = _report(runs[0]), short_titles(runs)
    others = [(title, _report(run)) for title, run in zip(titles[1:], runs[1:], strict=True)]
    reports = [(titles[0], report)] if report else []
    reports += [(title, other) for title, other in others if other]
    try:
        samples = _sample_rows(reports) if report else []
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # edited by hand
        path = runs[0].path / "report.json"
        raise DamagedRun(path, _("its samples can't be read")) from error
    text, differ = query.get("text", "")[:_MAX_SEARCH].strip(), "differ" in query
    shown = [
        sample for sample in samples
        if _contains(sample, text) and not (differ and sample["same"])
    ]  # fmt: skip
    pages = max(1, -(-len(shown) // _PAGE_SAMPLES))
    page = min(_number(query, "page", 1), pages)
    return render(
        "run_samples.jinja", t, samples=shown[(page - 1) * _PAGE_SAMPLES :][:_PAGE_SAMPLES],
        count=len(shown), total=len(samples), page=page, pages=pages, text=text, differ=differ,
        has_report=bool(report), error=report.get("comparison_error") if report else None,
        is_compared=len(reports) > 1, ROLES=summary.ROLES,
    )  # fmt: skip


def _report(run: Run) -> dict[str, Any] | None:
    """Return the run's report; None: it has none that can be used."""
    with suppress(UserError):
        return run.report()
    return None


def _sample_rows(reports: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the first report's samples, with the replies of its base and of all adapters."""
    others = [
        {repr(pair["messages"]): pair for pair in summary.sample_pairs(report)}
        for _title, report in reports[1:]
    ]
    rows = []
    for number, pair in enumerate(summary.sample_pairs(reports[0][1]), 1):
        replies = [
            Reply("", pair["before"], pair["before_ended"]),
            Reply(reports[0][0], pair["after"], pair["after_ended"]),
        ]
        for (title, _report), pairs in zip(reports[1:], others, strict=True):
            if other := pairs.get(repr(pair["messages"])):
                replies.append(Reply(title, other["after"], other["after_ended"]))
        same = len({reply.text for reply in replies}) == 1
        rows.append({**pair, "number": number, "replies": replies, "same": same})
    return rows


def _contains(sample: dict[str, Any], text: str) -> bool:
    """Return whether a sample's prompt, answer or replies have a text, without regard to case."""
    texts = [message["content"] for message in sample["messages"]]
    texts += [sample["reference"], *(reply.text for reply in sample["replies"])]
    return any(text.casefold() in each.casefold() for each in texts)


def _number(query: Mapping[str, str], name: str, least: int) -> int:
    """Return a whole number of the query, `least` where it is none or smaller."""
    text = query.get(name, "")
    return max(least, int(text)) if text.isdecimal() and len(text) < 7 else least


# --- log -------------------------------------------------------------------------------------


def _log(t: Locale, runs: Sequence[Run], query: Mapping[str, str]) -> str:
    run, text = runs[0], query.get("text", "")[:_MAX_SEARCH].strip()
    more = min(_number(query, "more", 0), len(_LOG_BYTES) - 1)
    tail, has_earlier = log_reader.read_tail(run.path, _LOG_BYTES[more])
    matches = log_reader.search(run.path, text, _MAX_MATCHES) if text else None
    warnings = dict.fromkeys(t(warning) for warning in _warnings(run))
    warnings |= dict.fromkeys(line.text for line in tail if line.level == "warning")
    size = (run.path / log_reader.FILE).stat().st_size if tail else 0
    return render(
        "run_log.jinja", t, run=run.name,
        lines=[(line.level, _split(line.text, text)) for line in matches.lines]
        if matches else [(line.level, [line.text]) for line in tail],
        text=text, matches=matches, warnings=list(warnings), more=more,
        next=more + 1 if has_earlier and more + 1 < len(_LOG_BYTES) else None,
        has_earlier=has_earlier, size=after_training.size_text(size) if size else None,
    )  # fmt: skip


def _split(line: str, text: str) -> list[str]:
    """Return the parts of a line: every second one is the text that was searched."""
    return re.split(f"({re.escape(text)})", line, flags=re.IGNORECASE)


def _warnings(run: Run) -> list[Message]:
    """Return the warnings of the run's report, or of its newest events."""
    texts: list[Any] = []
    if report := _report(run):
        texts = [warning.get("text") for warning in report.get("warnings", [])]
    else:
        with suppress(UserError):
            texts = [event.text for event in monitor.read_progress(run).warnings]
    result = []
    for text in texts:
        with suppress(ValueError):
            result.append(Message.from_json(text))
    return result


# --- export ----------------------------------------------------------------------------------


def render_export(t: Locale, run: Run, after: AfterTraining | None) -> str:
    """Return the HTML of a run's exports and jobs."""
    return render(
        "run_export.jinja", t, run=run, after=after,
        CHOICES=after_training.CHOICES, error_of=jobs.error_of,
        describe_progress=after_training.describe_progress,
        describe_check=after_training.describe_check, size_text=after_training.size_text,
        describe_name=after_training.describe_name,
        ollama_command=partial(after_training.ollama_command, run),
        describe_server=after_training.describe_server,
        is_in_container=after_training.is_in_container(),
    )  # fmt: skip
