"""Paired bootstrap intervals: is a difference between two sides more than noise?

Two sides (base and adapter, or two runs) have one row of statistics for each held-out row. A figure
is a function of the column sums of these statistics: bits per character are nats over characters, a
rate is a count over rows, chrF and BLEU are computed from counts of n-grams. Rows are resampled
with replacement, the same ones on both sides.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentile intervals); Koehn,
Statistical Significance Tests for Machine Translation Evaluation, 2004 (paired).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Table = NDArray[np.float64]  # [rows, statistics]; sums: [resamples, statistics]

RESAMPLES = 1000
CONFIDENCE = 0.95
# Fewer rows that differ make no clear difference: the two-sided sign test's lowest p-value for n
# rows is 2 / 2^n, and above 0.05 for n < 6. A percentile interval of few rows is too narrow.
MIN_DIFFERENT_ROWS = 6
_SEED = 0


@dataclass(frozen=True)
class Difference:
    """The second side's figure minus the first's, with its 95 % interval."""

    difference: float
    low: float
    high: float
    clear: bool  # the interval doesn't contain 0, and enough rows differ


def ratio(sums: Table) -> NDArray[np.float64]:
    """Return the first column sum over the second; 0 where the second is 0."""
    import numpy as np

    ratios = np.zeros(len(sums))
    return np.divide(sums[:, 0], sums[:, 1], out=ratios, where=sums[:, 1] != 0)


def paired_difference(
    before: Any, after: Any, figure: Callable[[Table], NDArray[np.float64]] = ratio
) -> Difference | None:
    """Return the difference of a figure between two sides; None where there are no rows.

    Args:
        before: statistics of the first side, [rows, statistics].
        after: those of the second side, of the same rows.
        figure: returns the figure of each of several column sums.

    Raises:
        ValueError: the sides have different shapes.
    """
    import numpy as np

    sides = np.asarray(before, float), np.asarray(after, float)
    if sides[0].shape != sides[1].shape:
        raise ValueError(f"the sides differ in shape: {sides[0].shape}, {sides[1].shape}")
    rows = len(sides[0])
    if not rows:
        return None
    first, second = (float(figure(side.sum(0, keepdims=True))[0]) for side in sides)
    different_rows = int((sides[0] != sides[1]).any(1).sum())
    # How often each row is drawn. The seed is fixed, so that the same rows give the same interval.
    counts = np.random.default_rng(_SEED).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    differences = figure(counts @ sides[1]) - figure(counts @ sides[0])
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(value) for value in np.quantile(differences, [tail, 1 - tail]))
    clear = (low > 0 or high < 0) and different_rows >= MIN_DIFFERENT_ROWS
    return Difference(second - first, low, high, clear)
