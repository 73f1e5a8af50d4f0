"""The figures of a comparison as text: before, after, and whether they differ clearly."""

from __future__ import annotations

from typing import Any

from jetson_ft.errors import Message, _

# Key in report.json's `before` and `after`, name (template), format, and 1 if higher is better,
# 0 if neither is; the last one is in `probes`.
METRICS = (
    ("loss", _("Loss on the answers (nats per token)"), "{:.3f}", -1),
    ("bits_per_char", _("Bits per character"), "{:.3f}", -1),
    ("chinese_share", _("Chinese share of the replies"), "{:.0%}", 1),
    ("stop_rate", _("Replies that end by themselves"), "{:.0%}", 1),
    ("repetition", _("Repeated 4-grams"), "{:.0%}", -1),
    ("rouge_l", "ROUGE-L", "{:.0%}", 1),
    ("chrf", "chrF", "{:.1f}", 1),
    ("bleu", "BLEU", "{:.1f}", 1),
    ("distinct_1", _("Different words (distinct-1)"), "{:.0%}", 0),
    ("distinct_2", _("Different word pairs (distinct-2)"), "{:.0%}", 0),
    ("probes", _("General questions answered"), "{:.0%}", 1),
)
# The same of plain text, whose held-out beginnings are continued.
_TEXT_NAMES = {
    "loss": _("Loss on the texts (nats per token)"),
    "chinese_share": _("Chinese share of the continuations"),
    "stop_rate": _("Continuations that end by themselves"),
}
_UNCLEAR = _("{difference}: no clear difference")
_TOO_FEW = _("{difference}: too few rows")  # the interval leaves out 0, but few rows make it


def is_text(report: dict[str, Any]) -> bool:
    """Return whether all held-out rows are plain text."""
    evaluated = report["eval"]
    return bool(evaluated) and evaluated.get("documents") == evaluated["rows"]  # not in older runs


def metric_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the before/after table, without figures that the report doesn't have.

    Each row has `key`, `name` (template), `before` and `after` (formatted; "" for a side that
    wasn't measured), `difference` (a message) and `verdict`: `better`, `worse`, `same`, `unclear`
    (the interval contains 0) or `unknown` (no interval: as in older reports).
    It is empty where the comparison failed.
    """
    evaluated = report["eval"]
    if not evaluated:
        return []
    rows = []
    names = _TEXT_NAMES if is_text(report) else {}
    for key, name, number, sign in METRICS:
        if key == "probes":
            probes = evaluated.get("probes") or {}
            values = {side: probes[side]["share"] for side in ("before", "after") if side in probes}
            interval = probes.get("difference")
        else:
            sides = {side: evaluated.get(side) or {} for side in ("before", "after")}
            values = {side: figures[key] for side, figures in sides.items() if key in figures}
            interval = evaluated.get("differences", {}).get(key)
        if values:
            row = {"key": key, "name": names.get(key, name)}
            rows.append(row | compared(values, interval, number, sign))
    return rows


def compared(
    values: dict[str, float], interval: dict[str, Any] | None, number: str, sign: int
) -> dict[str, Any]:
    """Return the formatted values of one or two sides, their difference and the verdict.

    Args:
        interval: `statistics.Difference` as JSON; None: not known.
        number: format of a value, such as `{:.3f}`.
        sign: 1 if higher is better, -1 if lower is, 0 if neither.
    """
    shown = {side: number.format(values[side]) if side in values else "" for side in values}
    row: dict[str, Any] = {"before": "", "after": "", **shown}
    if len(values) < 2 or interval is None:
        return row | {"difference": Message(""), "verdict": "unknown"}
    signed = number.replace("{:", "{:+")
    difference = signed.format(interval["difference"])
    if interval["low"] == interval["high"] == 0:
        return row | {"difference": Message(difference), "verdict": "same"}
    low, high = signed.format(interval["low"]), signed.format(interval["high"])
    template = "{difference} ({low} … {high})"
    text = Message(template, {"difference": difference, "low": low, "high": high})
    if not interval["clear"]:
        has_zero = interval["low"] <= 0 <= interval["high"]
        noise = Message(_UNCLEAR if has_zero else _TOO_FEW, {"difference": text})
        return row | {"difference": noise, "verdict": "unclear"}
    verdicts = {1: "better", -1: "worse", 0: "unknown"}
    direction = sign if interval["difference"] > 0 else -sign
    return row | {"difference": text, "verdict": verdicts[direction]}


def category_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the bits per character by category, as `metric_rows`; `name` is a category's."""
    evaluated = report["eval"] or {}
    rows = []
    for entry in evaluated.get("categories", []):
        values = {side: entry[side] for side in ("before", "after") if side in entry}
        row = compared(values, entry.get("difference"), "{:.3f}", -1)
        name = entry["name"] or "–"
        rows.append({"name": name, "rows": entry["rows"], **row})
    return rows


def probe_notes(report: dict[str, Any]) -> list[Message]:
    """Return a sentence on the general questions that base and adapter answer, if known."""
    probes = (report["eval"] or {}).get("probes") or {}
    interval = probes.get("difference")
    if not interval:
        return []
    text = _(
        "General questions: {lost} of {count} answers lost, {gained} gained: no clear difference."
    )
    if interval["clear"]:
        text = _("General questions: {gained} of {count} answers gained, {lost} lost.")
        if interval["difference"] < 0:
            text = _(
                "The adapter has forgotten general knowledge: {lost} of {count} answers lost, "
                "{gained} gained."
            )
    values = {"lost": len(probes["lost"]), "gained": len(probes["gained"])}
    return [Message(text, values | {"count": probes["count"]})]
