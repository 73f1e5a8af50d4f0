"""The arithmetic between measurements and table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.bench.table import (
    Line,
    loss_difference,
    markdown,
    seconds_left,
    summarise,
)

ARMS = ["trainer", "packed", "ours"]
rates = st.floats(1, 1e6)


def measured(
    arm: str, round_: int, rate: float, losses: Any = (2.0, 1.0), peak: int | None = 2**30
) -> dict[str, Any]:
    return {
        "arm": arm, "round": round_, "tokens_per_second": rate, "peak_memory_bytes": peak,
        "losses": list(losses), "roof_share": rate / 1e7,
    }  # fmt: skip


def failed(arm: str, round_: int, why: str = "out of memory") -> dict[str, Any]:
    return {"arm": arm, "round": round_, "error": why}


@st.composite
def rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to five rounds of the three arms, in which some fail."""
    count = draw(st.integers(1, 5))
    return [
        measured(arm, number, draw(rates)) if draw(st.booleans()) else failed(arm, number)
        for number in range(1, count + 1)
        for arm in ARMS
    ]


def by_arm(measurements: list[dict[str, Any]]) -> dict[str, Line]:
    return {line.arm: line for line in summarise(ARMS, {}, measurements)}


@given(rounds())
def test_an_arm_has_figures_or_a_reason_and_counts_its_rounds(found: list[dict[str, Any]]) -> None:
    for arm, line in by_arm(found).items():
        own = [one for one in found if one["arm"] == arm]
        assert line.rounds == sum("error" not in one for one in own)
        assert (line.tokens_per_second is None) == (line.rounds == 0)
        assert bool(line.reason) == (line.rounds < len(own))
        if line.rounds:
            assert line.slowest <= line.tokens_per_second <= line.fastest


@given(rounds())
def test_a_baseline_is_as_fast_as_itself(found: list[dict[str, Any]]) -> None:
    lines = by_arm(found)
    for name in ("trainer", "packed"):
        assert lines[name].ratios[name] == (1.0 if lines[name].rounds else None)
    assert lines["trainer"].loss_difference in (0.0, None)


@given(rounds(), st.lists(st.sampled_from([0.25, 0.5, 2.0, 8.0]), min_size=5, max_size=5))
def test_how_fast_the_machine_is_in_a_round_leaves_the_ratios(
    found: list[dict[str, Any]], speeds: list[float]
) -> None:
    slowed = [
        one if "error" in one
        else one | {"tokens_per_second": one["tokens_per_second"] * speeds[one["round"] - 1]}
        for one in found
    ]  # fmt: skip
    before, after = by_arm(found), by_arm(slowed)
    assert all(before[arm].ratios == after[arm].ratios for arm in ARMS)


@given(rounds(), st.randoms())
def test_the_order_of_measurements_says_nothing(found: list[dict[str, Any]], random: Any) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert by_arm(found) == by_arm(shuffled)


def test_ratios_are_taken_inside_a_round_and_then_the_median() -> None:
    pairs = [(100, 150), (10, 40), (200, 200)]
    found = [
        measured(arm, number, rate)
        for number, pair in enumerate(pairs, 1)
        for arm, rate in zip(("trainer", "ours"), pair, strict=True)
    ]
    line = by_arm(found)["ours"]
    assert line.ratios == {"trainer": 1.5, "packed": None}
    assert (line.slowest, line.tokens_per_second, line.fastest) == (40, 150, 200)


def test_a_round_without_the_baseline_is_no_pair() -> None:
    found = [
        failed("trainer", 1), measured("ours", 1, 1000),
        measured("trainer", 2, 100), measured("ours", 2, 300),
    ]  # fmt: skip
    lines = by_arm(found)
    assert lines["ours"].ratios["trainer"] == 3.0
    assert lines["trainer"].reason == "failed in 1 of 2 rounds: out of memory"


def test_peak_and_loss_difference_are_the_largest_of_all_rounds() -> None:
    found = [
        measured("trainer", 1, 100, (2.0, 1.0)), measured("ours", 1, 100, (2.25, 1.0), 5),
        measured("trainer", 2, 100, (2.0, 1.0)), measured("ours", 2, 100, (2.0, 0.5), 7),
    ]  # fmt: skip
    line = by_arm(found)["ours"]
    assert (line.peak_memory_bytes, line.loss_difference) == (7, 0.5)


def test_an_infinite_loss_is_no_difference() -> None:
    one, other = measured("ours", 1, 1, (None, 1.0)), measured("trainer", 1, 1, (2.0, 1.0))
    assert loss_difference(one, other) is None


def test_steps_of_other_rows_have_no_difference() -> None:
    one, other = measured("llamafactory-packed", 1, 1, ()), measured("trainer", 1, 1, (2.0, 1.0))
    assert loss_difference(one, other) is None


def test_time_left_is_what_each_arm_took_before() -> None:
    assert seconds_left(["a", "b"], []) is None
    assert seconds_left(["b", "c"], [("a", 10.0), ("b", 30.0)]) == 30.0 + 20.0


@given(rounds())
def test_the_table_has_a_whole_row_for_every_arm(found: list[dict[str, Any]]) -> None:
    skipped = {"trl": "trl is not installed"}
    names = [*ARMS, "trl"]
    lines = summarise(names, skipped, found)
    report = {
        "summary": [vars(line) for line in lines],
        "settings": {"threads": 2, "model": "m", "rank": 8, "data": "d", "max_length": 512,
                     "rounds": 5},
        "device": {"board": None, "name": "a CPU", "kind": "cpu"},
        "lesson": {"rows": 16, "steps": 2, "timed_tokens": 1234},
        "versions": {"torch": "2"}, "precision": "fp32", "rounds_done": 5,
        "arms": dict.fromkeys(names, "described"),
    }  # fmt: skip
    text = markdown(report).splitlines()
    rows = [line for line in text if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split()[1] for row in rows[2:]] == names
    for line in lines:
        assert not line.reason or f"- {line.arm}: {line.reason}" in text


@pytest.mark.parametrize("peak", [None, 2**31])
def test_a_peak_nobody_measured_is_a_dash(peak: int | None) -> None:
    line = by_arm([measured("ours", 1, 1.0, peak=peak)])["ours"]
    assert line.peak_memory_bytes == peak
