"""Rows into packs: nothing lost, nothing predicted across rows, no bin too full."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.models.packing import bins, pack, packs

ROWS: list[dict[str, Any]] = [
    {"input_ids": [10, 11, 12, 13], "parts": [0, 1, 2, 0]},
    {"input_ids": [20], "parts": [1]},
    {"input_ids": [30, 31, 32], "parts": [1, 1, 2]},
]


# Packs


def test_a_pack_holds_its_rows_one_behind_the_other() -> None:
    found = pack(ROWS)
    assert found.input_ids.tolist() == [[10, 11, 12, 13, 20, 30, 31, 32]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert found.row_lengths == [4, 1, 3]
    assert found.tokens == 8


def test_learnt_tokens_are_predicted_from_the_token_before_them_in_their_row() -> None:
    found = pack(ROWS)
    assert found.positions.tolist() == [0, 1, 5, 6]
    assert found.targets.tolist() == [11, 12, 31, 32]  # never a row's first: 20, 30
    assert found.is_answer.tolist() == [True, False, True, False]


def test_packing_leaves_the_rows_as_they_are() -> None:
    parts = np.array([1, 1], dtype=np.uint8)
    pack([{"input_ids": np.array([7, 8], dtype=np.int32), "parts": parts}])
    assert parts.tolist() == [1, 1]


def test_a_pack_moves_to_a_device_whole() -> None:
    moved = pack(ROWS).to("meta")
    lengths = vars(moved).pop("row_lengths")
    assert lengths == [4, 1, 3]
    assert {value.device.type for value in vars(moved).values()} == {"meta"}


def test_without_capacity_each_row_is_a_pack() -> None:
    found = list(packs(ROWS, 0))
    assert sorted(each.tokens for each in found) == [1, 3, 4]


def test_packs_fill_the_capacity() -> None:
    assert [each.tokens for each in packs(ROWS, 5)] == [5, 3]


# Bins

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@given(LENGTHS, st.integers(1, 50))
def test_every_row_is_in_exactly_one_bin_and_no_bin_is_too_full(
    lengths: list[int], capacity: int
) -> None:
    found = bins(lengths, capacity)
    assert sorted(index for each in found for index in each) == list(range(len(lengths)))
    for each in found:
        assert each and (sum(lengths[i] for i in each) <= capacity or len(each) == 1)


@given(LENGTHS, st.integers(60, 200))
def test_no_two_bins_could_have_been_one(lengths: list[int], capacity: int) -> None:
    loads = [sum(lengths[i] for i in each) for each in bins(lengths, capacity)]
    assert all(a + b > capacity for a, b in combinations(loads, 2))


@given(st.lists(st.integers(1, 25), max_size=200), st.integers(100, 200))
def test_short_rows_leave_little_room(lengths: list[int], capacity: int) -> None:
    # A bin is closed to rows of at most a quarter only when three quarters are full.
    assert len(bins(lengths, capacity)) <= math.ceil(sum(lengths) / capacity * 4 / 3) + 1


def test_long_rows_come_first_and_take_the_tightest_bin() -> None:
    # Written out, ties included: a run that is resumed must find the same bins.
    assert bins([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert bins([5, 7, 3, 2, 5], 10) == [[1, 2], [0, 4], [3]]
