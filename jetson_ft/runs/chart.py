"""Curves as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 34


def losses(train: Points, heldout: Points) -> str:
    """Training loss (thin: each step; thick: running mean) and held-out loss (dots).

    Returns an empty string where there is nothing to draw.
    """
    points = [*train, *heldout]
    if not points:
        return ""
    x_ticks = ticks(0, max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    place = _Scale(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss curves">',
            *(_horizontal(place, y) for y in y_ticks),
            *(_x_label(place, x) for x in x_ticks),
            _line(place, train, "raw"),
            _line(place, smoothed(train), "train"),
            _line(place, heldout, "heldout"),
            *(_dot(place, x, y) for x, y in heldout),
            "</svg>",
        ]
    )


def panel(name: str, series: Sequence[tuple[str, Points]]) -> str:
    """Several curves in one frame; each comes with its CSS class.

    Returns an empty string where there is nothing to draw.
    """
    points = [point for _, curve in series for point in curve]
    if not points:
        return ""
    x_ticks = ticks(0, max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    place = _Scale(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">',
            *(_horizontal(place, y) for y in y_ticks),
            *(_x_label(place, x) for x in x_ticks),
            *(_line(place, curve, style) for style, curve in series),
            *(_dot(place, *curve[0]) for _, curve in series if len(curve) == 1),
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
    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right, self.low, self.high = left, right, low, high

    def x(self, value: float) -> float:
        share = (value - self.left) / (self.right - self.left)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def _line(place: _Scale, points: Points, name: str) -> str:
    path = " ".join(f"{place.x(x)},{place.y(y)}" for x, y in points)
    return f'<polyline class="{name}" points="{path}"/>'


def _dot(place: _Scale, x: float, y: float) -> str:
    tip = f"<title>{x:g}: {y:.3f}</title>"
    return f'<circle class="heldout" cx="{place.x(x)}" cy="{place.y(y)}" r="3.5">{tip}</circle>'


def _horizontal(place: _Scale, value: float) -> str:
    y = place.y(value)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>'
    )


def _x_label(place: _Scale, value: float) -> str:
    y = HEIGHT - _BOTTOM + 20
    return f'<text x="{place.x(value)}" y="{y}" text-anchor="middle">{value:g}</text>'
