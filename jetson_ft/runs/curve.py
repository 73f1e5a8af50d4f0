"""A value by step, in bounded memory."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter

_MAX_POINTS = 1 << 13  # of a curve in memory


@dataclass
class Curve:
    """A value by step, ascending; a step that is made again takes its new value.

    Of more than `_MAX_POINTS` points some are left out, but no extreme.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: int, value: float) -> None:
        """Add a value, or replace that of the same step."""
        index = bisect_left(self.steps, step)
        if index < len(self.steps) and self.steps[index] == step:
            self.values[index] = value
            return
        self.steps.insert(index, step)
        self.values.insert(index, value)
        if len(self.steps) > _MAX_POINTS:
            steps, values = zip(*self.points(_MAX_POINTS // 2), strict=True)
            self.steps, self.values = array("q", steps), array("d", values)

    def points(self, at_most: int = 600) -> list[tuple[int, float]]:
        """Return at most so many points: the lowest and highest of `at_most` / 2 equal spans."""
        points = list(zip(self.steps, self.values, strict=True))
        if len(points) <= at_most:
            return points
        spans = max(1, at_most // 2)
        bounds = [number * len(points) // spans for number in range(spans + 1)]
        chosen = []
        for start, end in pairwise(bounds):
            low, high = (pick(points[start:end], key=itemgetter(1)) for pick in (min, max))
            chosen += sorted({low, high})
        return chosen
