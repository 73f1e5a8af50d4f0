"""From measurements to a table. Pure functions.

A measurement is what `bench.arm` wrote, with its `round` and `arm`; one that failed has an
`error` and no figures. Arms of one round ran one behind the other, on a machine in about the
same state: so ratios and loss differences are taken inside a round, and the median comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jetson_ft.bench.arms import BASELINES

Measurement = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """An arm over all rounds; None where nothing can be said."""

    arm: str
    rounds: int  # that succeeded
    tokens_per_second: float | None  # median
    slowest: float | None
    fastest: float | None
    ratios: dict[str, float | None]  # to each baseline, median
    peak_memory_bytes: int | None  # largest
    loss_difference: float | None  # to `trainer`, largest of any step, in nats
    roof_share: float | None  # median
    reason: str  # of not having run, or of failing


def summarise(
    arms: Sequence[str], skipped: dict[str, str], measurements: Sequence[Measurement]
) -> list[Line]:
    """One line an arm, in the order given."""
    return [_line(arm, skipped.get(arm, ""), measurements) for arm in arms]


def _line(arm: str, skipped: str, measurements: Sequence[Measurement]) -> Line:
    own = [one for one in measurements if one["arm"] == arm]
    good = [one for one in own if "error" not in one]
    rates = [one["tokens_per_second"] for one in good]
    peaks = [one["peak_memory_bytes"] for one in good if one["peak_memory_bytes"] is not None]
    return Line(
        arm=arm,
        rounds=len(good),
        tokens_per_second=median(rates) if rates else None,
        slowest=min(rates, default=None),
        fastest=max(rates, default=None),
        ratios={name: _median(_pairs(good, name, measurements, ratio)) for name in BASELINES},
        peak_memory_bytes=max(peaks, default=None),
        loss_difference=_largest(_pairs(good, "trainer", measurements, loss_difference)),
        roof_share=_median([one["roof_share"] for one in good]),
        reason=skipped or _failures(own),
    )


def _pairs(
    own: Sequence[Measurement],
    baseline: str,
    measurements: Sequence[Measurement],
    compare: Callable[[Measurement, Measurement], float | None],
) -> list[float | None]:
    """The comparison of each measurement with the baseline's of the same round."""
    theirs = {
        one["round"]: one for one in measurements if one["arm"] == baseline and "error" not in one
    }
    return [compare(one, theirs[one["round"]]) for one in own if one["round"] in theirs]


def ratio(one: Measurement, baseline: Measurement) -> float:
    """How many times as fast."""
    return float(one["tokens_per_second"] / baseline["tokens_per_second"])


def loss_difference(one: Measurement, baseline: Measurement) -> float | None:
    """The largest of any step; None where a step's loss was infinite or its rows are others."""
    if len(one["losses"]) != len(baseline["losses"]):
        return None
    steps = zip(one["losses"], baseline["losses"], strict=True)
    gaps = [None if a is None or b is None else abs(a - b) for a, b in steps]
    return _largest(gaps)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _largest(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known: it may have been the largest."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _failures(own: Sequence[Measurement]) -> str:
    """Why rounds failed; the first of several reasons."""
    errors = [one["error"] for one in own if "error" in one]
    return f"failed in {len(errors)} of {len(own)} rounds: {errors[0]}" if errors else ""


def seconds_left(turns: Sequence[str], taken: Sequence[tuple[str, float]]) -> float | None:
    """For the arms still to come, by what each took before; None as long as none has ended.

    An arm that hasn't run yet is taken for as long as the mean of those that have.
    """
    if not taken:
        return None
    mean = sum(seconds for _, seconds in taken) / len(taken)
    latest = dict(taken)
    return sum(latest.get(arm, mean) for arm in turns)


# --- for people ----------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """`bench.md` from `bench.json`'s content."""
    lines = [Line(**line) for line in report["summary"]]
    return "\n".join([*_heading(report), "", *_table(lines), "", *_notes(report, lines), ""])


def _heading(report: dict[str, Any]) -> list[str]:
    settings, device, lesson = report["settings"], report["device"], report["lesson"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        "# LoRA training, arm against arm",
        "",
        f"- {device['board'] or device['name']} ({device['kind']}), "
        f"{settings['threads']} threads, {report['precision']}",
        f"- {settings['model']}, LoRA rank {settings['rank']} on all linear layers; {versions}",
        f"- {lesson['rows']} rows of {settings['data']} cut at {settings['max_length']} tokens, "
        f"8 rows a step; {lesson['steps'] - 1} of {lesson['steps']} steps timed "
        f"({lesson['timed_tokens']:,} tokens)",
        f"- {report['rounds_done']} of {settings['rounds']} rounds, arms interleaved",
    ]


def _table(lines: Sequence[Line]) -> list[str]:
    """Rates in tokens a second without padding; lowest to highest round in brackets."""
    head = (
        "arm", "tokens/s", *(f"x {name}" for name in BASELINES),
        "peak GiB", "loss difference", "of the roof",
    )  # fmt: skip
    rows = [head, ("---", *["---:"] * (len(head) - 1)), *map(_cells, lines)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]


def _cells(line: Line) -> tuple[str, ...]:
    rate = "–"
    if line.tokens_per_second is not None:
        rate = f"{line.tokens_per_second:,.0f} ({line.slowest:,.0f} to {line.fastest:,.0f})"
    peak = line.peak_memory_bytes
    return (
        line.arm,
        rate,
        *(_shown(line.ratios[name], "{:.2f}") for name in BASELINES),
        _shown(peak / 2**30 if peak is not None else None, "{:.2f}"),
        _shown(line.loss_difference, "{:.4f}"),
        _shown(line.roof_share, "{:.0%}"),
    )


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _notes(report: dict[str, Any], lines: Sequence[Line]) -> list[str]:
    told = [f"- {line.arm}: {line.reason}" for line in lines if line.reason]
    heading = ["Not run, or not always:", "", *told, ""] if told else []
    described = [f"- {line.arm}: {report['arms'][line.arm]}" for line in lines]
    return [
        *heading,
        "Arms:",
        "",
        *described,
        "",
        "Tokens/s without padding: median of the rounds (lowest to highest). Ratios are taken "
        "inside a round, then the median. The loss difference is the largest of any step, to "
        "`trainer`. The roof is what the matrix rate measured beside each run allows.",
    ]
