"""Curves as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """A chart's size and margins, in SVG's units."""

    width: int = 720
    height: int = 300
    left: int = 46
    right: int = 14
    top: int = 14
    bottom: int = 34


LARGE = Frame()
SMALL = Frame(width=360, height=200, left=58, bottom=30)  # its text looks as large at half the size


def losses(train: Points, heldout: Points) -> str:
    """Draw the training loss of each step (thin), its running mean, and the held-out loss."""
    curves = [("raw", train), ("train", smoothed(train)), ("heldout", heldout)]
    return panel("loss curves", curves)


def panel(name: str, series: Sequence[tuple[str, Points]], frame: Frame = LARGE) -> str:
    """Draw several curves, each with its CSS class; without points return an empty text."""
    points = [point for _, curve in series for point in curve]
    if not points:
        return ""
    x_ticks = ticks(0, max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom

    def to_x(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(left + share * (right - left), 1)

    def to_y(value: float) -> float:
        share = (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])
        return round(frame.top + share * (bottom - frame.top), 1)

    size = f"0 0 {frame.width} {frame.height}"
    parts = [f'<svg viewBox="{size}" role="img" aria-label="{escape(name)}">']
    for value in y_ticks:
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        anchor = "end" if value == x_ticks[-1] else "middle"  # centred, the last would be cut
        place = f'x="{to_x(value)}" y="{bottom + 20}" text-anchor="{anchor}"'
        parts.append(f"<text {place}>{value:g}</text>")
    for style, curve in series:
        path = " ".join(f"{to_x(x)},{to_y(y)}" for x, y in curve)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
    for style, curve in series:
        if "heldout" in style or (len(curve) == 1 and style != "raw"):
            parts += [
                f'<circle class="{style}" cx="{to_x(x)}" cy="{to_y(y)}" r="3.5">'
                f"<title>{x:g}: {y:.3f}</title></circle>"
                for x, y in curve
            ]
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that enclose the range."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def smoothed(points: Points, window: int = 9) -> list[tuple[float, float]]:
    """Return the centred running mean over at most `window` points."""
    half = min(window, max(1, len(points) // 4)) // 2
    result = []
    for index, (x, _) in enumerate(points):
        neighbours = [y for _, y in points[max(0, index - half) : index + half + 1]]
        result.append((x, sum(neighbours) / len(neighbours)))
    return result
