"""Bootstrap intervals: coverage on synthetic rows, and values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from jetson_ft.inference.statistics import Difference, paired_difference, ratio


def test_identical_sides_differ_by_exactly_zero() -> None:
    rows = [[float(n), 3.0] for n in range(20)]
    assert paired_difference(rows, rows) == Difference(0.0, 0.0, 0.0, clear=False)


def test_interval_covers_the_true_difference_as_often_as_stated() -> None:
    """Of 300 samples of 60 rows about 95 % of the intervals contain the true difference."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        before = np.stack([generator.gamma(2.0, 10.0, 60), generator.integers(5, 30, 60)], 1)
        after = before.copy()
        after[:, 0] += generator.normal(-3.0, 6.0, 60)
        pair = paired_difference(before, after)
        assert pair
        true = -3.0 / 17.0  # of nats over characters, whose mean is 17
        covered += pair.low <= true <= pair.high
    assert 0.90 <= covered / 300 <= 0.985


def test_noise_is_clear_as_seldom_as_stated() -> None:
    generator = np.random.default_rng(2)
    clear = 0
    for _ in range(300):
        before = np.stack([generator.normal(50.0, 10.0, 40), np.full(40, 20.0)], 1)
        after = before.copy()
        after[:, 0] += generator.normal(0.0, 4.0, 40)
        pair = paired_difference(before, after)
        clear += bool(pair and pair.clear)
    assert clear / 300 <= 0.09


def test_two_rows_give_the_interval_computed_by_hand() -> None:
    """Resamples of two rows have a mean difference of 1, 2 or 3: quarter, half, quarter."""
    pair = paired_difference([[0.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [3.0, 1.0]])
    assert pair == Difference(2.0, 1.0, 3.0, clear=False)


@pytest.mark.parametrize(("changed", "clear"), [(1, False), (5, False), (6, True), (40, True)])
def test_few_rows_that_differ_are_no_clear_difference(changed: int, clear: bool) -> None:
    before = [[1.0, 1.0]] * 40
    after = [[0.0 if n < changed else 1.0, 1.0] for n in range(40)]
    pair = paired_difference(before, after)
    assert pair and pair.difference == pytest.approx(-changed / 40)
    assert pair.clear is clear


def test_rows_are_paired() -> None:
    """The rows vary far more than the difference: unpaired, nothing would be seen."""
    before = [[float(100 * n), 1.0] for n in range(30)]
    after = [[value + 1.0 + n % 3, 1.0] for n, (value, _one) in enumerate(before)]
    pair = paired_difference(before, after)
    assert pair and pair.clear and pair.high < 3.0


def test_no_rows_and_no_denominator() -> None:
    assert paired_difference(np.empty((0, 2)), np.empty((0, 2))) is None
    assert ratio(np.array([[1.0, 0.0], [1.0, 2.0]])).tolist() == [0.0, 0.5]
    with pytest.raises(ValueError, match="differ in shape"):
        paired_difference([[1.0, 1.0]], [[1.0, 1.0]] * 2)
