"""Rows into packs: nothing lost, nothing predicted across rows, no bin too full."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.models.packing import bins, pack, packs

# As a template writes them: the same four tokens in front, none of them learnt.
ALIKE: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, 4, 50, 51], "parts": [0, 0, 0, 0, 0, 1]},
    {"input_ids": [1, 2, 3, 4, 60], "parts": [0, 0, 0, 0, 1]},
    {"input_ids": [1, 2, 3, 4, 50, 71, 72], "parts": [0, 0, 0, 0, 0, 1, 2]},
]
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
    lengths, opening = (vars(moved).pop(name) for name in ("row_lengths", "opening"))
    assert (lengths, opening) == ([4, 1, 3], 0)
    assert {value.device.type for value in vars(moved).values()} == {"meta"}


def test_without_capacity_each_row_is_a_pack() -> None:
    found = list(packs(ROWS, 0))
    assert sorted(each.tokens for each in found) == [1, 3, 4]


def test_the_fullest_pack_comes_first() -> None:
    rows = [{"input_ids": [1] * size, "parts": [0] * size} for size in (6, 5, 5)]
    assert [sum(each.row_lengths) for each in packs(rows, 10)] == [10, 6]


def test_packs_fill_the_capacity() -> None:
    assert [each.tokens for each in packs(ROWS, 5)] == [5, 3]


# Openings


def test_what_all_rows_begin_with_is_held_once() -> None:
    found = pack(ALIKE)
    assert found.input_ids.tolist() == [[1, 2, 3, 4, 50, 51, 60, 50, 71, 72]]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 4, 5, 6]]
    assert (found.opening, found.row_lengths) == (4, [6, 5, 7])
    # The second row's first own token is predicted at the opening's end.
    assert found.positions.tolist() == [4, 3, 7, 8]
    assert found.targets.tolist() == [51, 60, 71, 72]
    assert found.is_answer.tolist() == [True, True, True, False]


def test_a_row_that_begins_otherwise_shares_nothing() -> None:
    assert pack([*ALIKE, {"input_ids": [9, 2, 3, 4], "parts": [0, 0, 0, 1]}]).opening == 0


def test_what_is_learnt_in_a_row_is_shared_with_none() -> None:
    learns_early = ALIKE[0] | {"parts": [0, 0, 1, 0, 0, 1]}
    assert pack([learns_early, *ALIKE[1:]]).opening == 2


def test_each_row_keeps_a_token_of_its_own() -> None:
    assert pack([ALIKE[0], ALIKE[0], {"input_ids": [1, 2, 3], "parts": [0, 0, 0]}]).opening == 2


def test_sharing_little_of_long_rows_is_not_worth_it() -> None:
    long = [{"input_ids": [1, n, *range(200)], "parts": [0] * 202} for n in (2, 3)]
    assert pack(long).opening == 0


TOKENS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0, 0, 1, 2])), min_size=1)


@given(st.lists(st.integers(1, 3), max_size=12), st.lists(TOKENS, min_size=1, max_size=5))
def test_shared_or_not_the_same_is_learnt_from_the_same(
    opening: list[int], own: list[list[tuple[int, int]]]
) -> None:
    rows = [
        {
            "input_ids": opening + [i for i, _ in rest],
            "parts": [0] * len(opening) + [p for _, p in rest],
        }
        for rest in own
    ]
    whole, shared = pack(rows, share=False), pack(rows)
    assert shared.targets.equal(whole.targets) and shared.is_answer.equal(whole.is_answer)
    assert shared.row_lengths == whole.row_lengths
    assert shared.tokens == whole.tokens - shared.opening * (len(rows) - 1)
    for place in ("input_ids", "position_ids"):
        seen, expected = (getattr(p, place)[0][p.positions] for p in (shared, whole))
        assert seen.equal(expected)


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
