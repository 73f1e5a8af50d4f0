"""Packs hold every row, predict nothing across rows, and no bin is too full."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.kernels.packing import best_fit_bins, make_packs, pack_rows

# As a template writes them: the same four tokens in front, none of them trained on.
PREFIXED: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3, 4, 50, 51], "segments": [0, 0, 0, 0, 0, 1]},
    {"input_ids": [1, 2, 3, 4, 60], "segments": [0, 0, 0, 0, 1]},
    {"input_ids": [1, 2, 3, 4, 50, 71, 72], "segments": [0, 0, 0, 0, 0, 1, 2]},
]
ROWS: list[dict[str, Any]] = [
    {"input_ids": [10, 11, 12, 13], "segments": [0, 1, 2, 0]},
    {"input_ids": [20], "segments": [1]},
    {"input_ids": [30, 31, 32], "segments": [1, 1, 2]},
]


# Packs


def test_a_pack_concatenates_its_rows() -> None:
    pack = pack_rows(ROWS)
    assert pack.input_ids.tolist() == [[10, 11, 12, 13, 20, 30, 31, 32]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert pack.row_lengths == [4, 1, 3]
    assert pack.tokens == 8


def test_trained_tokens_are_predicted_from_the_token_before_them_in_their_row() -> None:
    pack = pack_rows(ROWS)
    assert pack.positions.tolist() == [0, 1, 5, 6]
    assert pack.targets.tolist() == [11, 12, 31, 32]  # never a row's first: 20, 30
    assert pack.is_answer.tolist() == [True, False, True, False]


def test_packing_does_not_change_the_rows() -> None:
    segments = np.array([1, 1], dtype=np.uint8)
    pack_rows([{"input_ids": np.array([7, 8], dtype=np.int32), "segments": segments}])
    assert segments.tolist() == [1, 1]


def test_moving_a_pack_moves_all_its_tensors() -> None:
    moved = pack_rows(ROWS).to("meta")
    lengths, shared_prefix = (vars(moved).pop(name) for name in ("row_lengths", "shared_prefix"))
    assert (lengths, shared_prefix) == ([4, 1, 3], 0)
    assert {value.device.type for value in vars(moved).values()} == {"meta"}


def test_without_capacity_each_row_is_a_pack() -> None:
    packs = list(make_packs(ROWS, 0))
    assert sorted(each.tokens for each in packs) == [1, 3, 4]


def test_the_fullest_pack_comes_first() -> None:
    rows = [{"input_ids": [1] * size, "segments": [0] * size} for size in (6, 5, 5)]
    assert [sum(each.row_lengths) for each in make_packs(rows, 10)] == [10, 6]


def test_packs_fill_the_capacity() -> None:
    assert [each.tokens for each in make_packs(ROWS, 5)] == [5, 3]


# Shared prefixes


def test_a_shared_prefix_is_in_the_pack_once() -> None:
    pack = pack_rows(PREFIXED)
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 50, 51, 60, 50, 71, 72]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 4, 5, 6]]
    assert (pack.shared_prefix, pack.row_lengths) == (4, [6, 5, 7])
    # The second row's first own token is predicted at the end of the prefix.
    assert pack.positions.tolist() == [4, 3, 7, 8]
    assert pack.targets.tolist() == [51, 60, 71, 72]
    assert pack.is_answer.tolist() == [True, True, True, False]


def test_a_row_that_begins_otherwise_prevents_sharing() -> None:
    assert (
        pack_rows([*PREFIXED, {"input_ids": [9, 2, 3, 4], "segments": [0, 0, 0, 1]}]).shared_prefix
        == 0
    )


def test_trained_tokens_are_not_shared() -> None:
    trained_early = PREFIXED[0] | {"segments": [0, 0, 1, 0, 0, 1]}
    assert pack_rows([trained_early, *PREFIXED[1:]]).shared_prefix == 2


def test_each_row_keeps_a_token_beside_the_prefix() -> None:
    assert (
        pack_rows(
            [PREFIXED[0], PREFIXED[0], {"input_ids": [1, 2, 3], "segments": [0, 0, 0]}]
        ).shared_prefix
        == 2
    )


def test_a_short_prefix_of_long_rows_is_not_shared() -> None:
    long = [{"input_ids": [1, n, *range(200)], "segments": [0] * 202} for n in (2, 3)]
    assert pack_rows(long).shared_prefix == 0


TOKENS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0, 0, 1, 2])), min_size=1)


@given(st.lists(st.integers(1, 3), max_size=12), st.lists(TOKENS, min_size=1, max_size=5))
def test_sharing_changes_no_target_and_no_input(
    shared_prefix: list[int], own: list[list[tuple[int, int]]]
) -> None:
    rows = [
        {
            "input_ids": shared_prefix + [i for i, _ in rest],
            "segments": [0] * len(shared_prefix) + [p for _, p in rest],
        }
        for rest in own
    ]
    whole, shared = pack_rows(rows, share=False), pack_rows(rows)
    assert shared.targets.equal(whole.targets) and shared.is_answer.equal(whole.is_answer)
    assert shared.row_lengths == whole.row_lengths
    assert shared.tokens == whole.tokens - shared.shared_prefix * (len(rows) - 1)
    for place in ("input_ids", "position_ids"):
        actual, expected = (getattr(p, place)[0][p.positions] for p in (shared, whole))
        assert actual.equal(expected)


# Bins

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@given(LENGTHS, st.integers(1, 50))
def test_every_row_is_in_exactly_one_bin_and_no_bin_is_too_full(
    lengths: list[int], capacity: int
) -> None:
    pack = best_fit_bins(lengths, capacity)
    assert sorted(index for each in pack for index in each) == list(range(len(lengths)))
    for each in pack:
        assert each and (sum(lengths[i] for i in each) <= capacity or len(each) == 1)


@given(LENGTHS, st.integers(60, 200))
def test_no_two_bins_could_have_been_one(lengths: list[int], capacity: int) -> None:
    loads = [sum(lengths[i] for i in each) for each in best_fit_bins(lengths, capacity)]
    assert all(a + b > capacity for a, b in combinations(loads, 2))


@given(st.lists(st.integers(1, 25), max_size=200), st.integers(100, 200))
def test_short_rows_leave_little_room(lengths: list[int], capacity: int) -> None:
    # A bin is closed to rows of at most a quarter only when three quarters are full.
    assert len(best_fit_bins(lengths, capacity)) <= math.ceil(sum(lengths) / capacity * 4 / 3) + 1


def test_long_rows_come_first_and_take_the_tightest_bin() -> None:
    # Written out, ties included: a run that is resumed must find the same bins.
    assert best_fit_bins([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert best_fit_bins([5, 7, 3, 2, 5], 10) == [[1, 2], [0, 4], [3]]
