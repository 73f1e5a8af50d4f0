"""Curves as SVG: round ticks, all points inside the frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.runs.report.chart import LARGE, losses, smoothed, ticks

values = st.floats(0, 1e6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 7, [0, 2, 4, 6, 8]),
        (2.31, 3.94, [2, 2.5, 3, 3.5, 4]),
        (0, 0, [0, 0.2]),
        (3, 3, [3, 4]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@given(values, values)
def test_ticks_enclose_the_range_and_are_few(first: float, second: float) -> None:
    low, high = sorted((first, second))
    if high - low < 1e-6 * high or high < 1e-6:
        return
    result = ticks(low, high)
    slack = 1e-6 * (high - low)
    assert result[0] <= low + slack and result[-1] >= high - slack
    assert 2 <= len(result) <= 7 and result == sorted(set(result))


def test_running_mean_is_centred() -> None:
    points = [(float(x), float(x)) for x in range(40)]
    assert smoothed(points)[20] == (20.0, 20.0)
    spike = [(float(x), 9.0 if x == 20 else 0.0) for x in range(40)]
    assert smoothed(spike)[20][1] == pytest.approx(1.0)
    assert len(smoothed(spike)) == 40


def test_two_points_are_not_smoothed() -> None:
    assert smoothed([(1.0, 5.0), (2.0, 3.0)]) == [(1.0, 5.0), (2.0, 3.0)]


def test_no_points_give_an_empty_chart() -> None:
    assert losses([], []) == ""


@given(
    st.lists(st.tuples(st.integers(0, 500), st.floats(0.01, 20)), max_size=30),
    st.lists(st.tuples(st.integers(0, 500), st.floats(0.01, 20)), min_size=1, max_size=5),
)
def test_curves_are_well_formed_and_inside_the_frame(
    train: list[tuple[int, float]], heldout: list[tuple[int, float]]
) -> None:
    svg = losses(train, heldout)
    root = ElementTree.fromstring(svg)
    places = [
        tuple(map(float, pair.split(",")))
        for line in root.iter("polyline")
        for pair in line.attrib["points"].split()
    ]
    assert len(places) == 2 * len(train) + len(heldout)
    assert all(0 <= x <= LARGE.width and 0 <= y <= LARGE.height for x, y in places)
    assert len(re.findall("<circle", svg)) == len(heldout) + (len(train) == 1)


def test_lower_loss_is_drawn_lower() -> None:
    svg = losses([], [(0, 4.0), (10, 2.0)])
    (first, second) = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert float(first[0]) < float(second[0])
    assert float(first[1]) < float(second[1]), "y grows downwards in SVG"
