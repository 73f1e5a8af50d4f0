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
    """Training loss (thin: each step; thick: running mean) and held-out loss (dots).

    Returns an empty string where there is nothing to draw.
    """
    curves = [("raw", train), ("train", smoothed(train)), ("heldout", heldout)]
    return panel("loss curves", curves)


def panel(name: str, series: Sequence[tuple[str, Points]], frame: Frame = LARGE) -> str:
    """Several curves in one frame, each with its CSS class; `heldout` ones with dots.

    Returns an empty string where there is nothing to draw.
    """
    points = [point for _, curve in series for point in curve]
    if not points:
        return ""
    x_ticks = ticks(0, max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    place = _Scale(frame, x_ticks, y_ticks)
    size = f"0 0 {frame.width} {frame.height}"
    return "\n".join(
        [
            f'<svg viewBox="{size}" role="img" aria-label="{escape(name)}">',
            *(place.horizontal(y) for y in y_ticks),
            *(place.x_label(x) for x in x_ticks),
            *(place.line(curve, style) for style, curve in series),
            *(
                place.dot(x, y, style)
                for style, curve in series
                if "heldout" in style or (len(curve) == 1 and style != "raw")
                for x, y in curve
            ),
            "</svg>",
        ]
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that enclose the range, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def smoothed(points: Points, window: int = 9) -> list[tuple[float, float]]:
    """Centred running mean."""
    half = min(window, max(1, len(points) // 4)) // 2
    result = []
    for index, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, index - half) : index + half + 1]]
        result.append((x, sum(near) / len(near)))
    return result


class _Scale:
    """From values to places in a frame, and what is drawn there."""

    def __init__(self, frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        self.frame = frame
        self.left, self.right = x_ticks[0], x_ticks[-1]
        self.low, self.high = y_ticks[0], y_ticks[-1]

    def x(self, value: float) -> float:
        frame, share = self.frame, (value - self.left) / (self.right - self.left)
        return round(frame.left + share * (frame.width - frame.left - frame.right), 1)

    def y(self, value: float) -> float:
        frame, share = self.frame, (self.high - value) / (self.high - self.low)
        return round(frame.top + share * (frame.height - frame.top - frame.bottom), 1)

    def line(self, points: Points, style: str) -> str:
        path = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        return f'<polyline class="{style}" points="{path}"/>'

    def dot(self, x: float, y: float, style: str) -> str:
        tip = f"<title>{x:g}: {y:.3f}</title>"
        return f'<circle class="{style}" cx="{self.x(x)}" cy="{self.y(y)}" r="3.5">{tip}</circle>'

    def horizontal(self, value: float) -> str:
        left, right, y = self.frame.left, self.frame.width - self.frame.right, self.y(value)
        return (
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>'
        )

    def x_label(self, value: float) -> str:
        """Under its place; the last one ends at the frame's edge, where half of it would be cut."""
        anchor = "end" if value == self.right else "middle"
        x, y = self.x(value), self.frame.height - self.frame.bottom + 20
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{value:g}</text>'
