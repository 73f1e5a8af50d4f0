"""The table of a benchmark, from its measurements. Pure functions.

The variants of one round ran one after the other, while the machine was in about the same state.
So ratios and loss differences are taken inside a round; their median, or maximum, comes after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# The content of `bench.json` and its rounds, each a variant in a round: see benchmarks/README.md.
# A variant that failed has `error` and no figures.
Report = dict[str, Any]
Measurement = dict[str, Any]
BASELINES = ("trainer", "packed")  # the others' speed is given relative to these


@dataclass(frozen=True)
class SummaryRow:
    """A variant over all rounds; None where a figure isn't known."""

    variant: str
    rounds: int  # that succeeded
    tokens_per_second: float | None  # median
    slowest: float | None
    fastest: float | None
    ratios: dict[str, float | None]  # speed relative to each baseline, median
    peak_memory_bytes: int | None  # maximum
    loss_difference: float | None  # from `trainer`, maximum of all steps, in nats
    share_of_peak: float | None  # median
    reason: str  # why it was skipped, or failed


def summarize(
    variants: Sequence[str], skipped: Mapping[str, str], measurements: Sequence[Measurement]
) -> list[SummaryRow]:
    """Return one row for each variant, in the order given."""
    rows = []
    for variant in variants:
        rounds = [each for each in measurements if each["variant"] == variant]
        errors = [each["error"] for each in rounds if "error" in each]
        succeeded = [each for each in rounds if "error" not in each]
        rates = [each["tokens_per_second"] for each in succeeded]
        shares = [each["share_of_peak"] for each in succeeded]
        peaks = [peak for each in succeeded if (peak := each["peak_memory_bytes"]) is not None]
        failures = f"failed in {len(errors)} of {len(rounds)} rounds: {errors[0]}" if errors else ""
        pairs = {name: pair_by_round(succeeded, name, measurements) for name in BASELINES}
        row = SummaryRow(
            variant=variant,
            rounds=len(succeeded),
            tokens_per_second=median(rates) if rates else None,
            slowest=min(rates, default=None),
            fastest=max(rates, default=None),
            ratios={name: median(speed_ratios(p)) if p else None for name, p in pairs.items()},
            peak_memory_bytes=max(peaks, default=None),
            loss_difference=maximum([loss_difference(*pair) for pair in pairs["trainer"]]),
            share_of_peak=median(shares) if shares else None,
            reason=skipped.get(variant, failures),
        )
        rows.append(row)
    return rows


def pair_by_round(
    variant: Sequence[Measurement], baseline: str, measurements: Sequence[Measurement]
) -> list[tuple[Measurement, Measurement]]:
    """Return each measurement with the baseline's of the same round, where that succeeded."""
    by_round = {
        each["round"]: each
        for each in measurements
        if each["variant"] == baseline and "error" not in each
    }
    return [(each, by_round[each["round"]]) for each in variant if each["round"] in by_round]


def speed_ratios(pairs: Sequence[tuple[Measurement, Measurement]]) -> list[float]:
    """Return the speeds relative to the baseline's."""
    return [each["tokens_per_second"] / base["tokens_per_second"] for each, base in pairs]


def require_success(measurements: Sequence[Measurement]) -> None:
    """Raise SystemExit with the variant and its error if one failed."""
    for failed in (each for each in measurements if "error" in each):
        raise SystemExit(f"{failed['variant']}: {failed['error']}")


def loss_difference(variant: Measurement, baseline: Measurement) -> float | None:
    """Return the maximum over the steps; None: a loss wasn't finite, or the rows differ."""
    if len(variant["losses"]) != len(baseline["losses"]):
        return None
    pairs = zip(variant["losses"], baseline["losses"], strict=True)
    return maximum([None if a is None or b is None else abs(a - b) for a, b in pairs])


def maximum(values: Sequence[float | None]) -> float | None:
    """Return the maximum; None where a value isn't known, as it may have been the maximum."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def seconds_left(variants: Sequence[str], durations: Mapping[str, float]) -> float | None:
    """Return the seconds for the variants still to run; None while no variant has ended.

    A variant that has no duration yet takes the mean of the others.
    """
    if not durations:
        return None
    mean = sum(durations.values()) / len(durations)
    return sum(durations.get(variant, mean) for variant in variants)


def markdown(report: Report) -> str:
    """Return the content of `bench.md`."""
    settings, device, workload = report["settings"], report["device"], report["workload"]
    rows = [SummaryRow(**row) for row in report["summary"]]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    reasons = [f"- {row.variant}: {row.reason}" for row in rows if row.reason]
    head = (
        "variant", "tokens/s", *(f"x {name}" for name in BASELINES),
        "peak GiB", "loss difference", "share of peak",
    )  # fmt: skip
    text = [
        "# LoRA training: variants compared",
        "",
        f"- {device['board'] or device['name']} ({device['kind']}), "
        f"{settings['threads']} threads, {report['precision']}",
        f"- {settings['model']}, LoRA rank {settings['rank']} on all linear layers; {versions}",
        f"- {workload['rows']} rows of {settings['data']} cut at {settings['max_length']} tokens, "
        f"8 rows per step; {workload['steps'] - 1} of {workload['steps']} steps timed "
        f"({workload['timed_tokens']:,} tokens)",
        f"- {report['rounds_done']} of {settings['rounds']} rounds, variants interleaved",
        "",
        *markdown_table(head, [_cells(row) for row in rows]),
        "",
        *(["Skipped or failed:", "", *reasons, ""] if reasons else []),
        "Variants:",
        "",
        *(f"- {row.variant}: {report['variants'][row.variant]}" for row in rows),
        "",
        "Tokens/s without padding: median of the rounds (slowest to fastest). Ratios are taken "
        "inside a round, then the median. The loss difference is the maximum of all steps, from "
        "`trainer`. The share of peak is the required arithmetic as a share of the matrix-product "
        "rate measured before and after each training run.",
        "",
    ]
    return "\n".join(text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column is left-aligned, the others right-aligned."""
    grid = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in grid]


def _cells(row: SummaryRow) -> tuple[str, ...]:
    peak = row.peak_memory_bytes
    rate = _format(row.tokens_per_second, ",.0f")
    if row.rounds:
        rate += f" ({row.slowest:,.0f} to {row.fastest:,.0f})"
    return (
        row.variant,
        rate,
        *(_format(row.ratios[name], ".2f") for name in BASELINES),
        _format(None if peak is None else peak / 2**30, ".2f"),
        _format(row.loss_difference, ".4f"),
        _format(row.share_of_peak, ".0%"),
    )


def _format(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
