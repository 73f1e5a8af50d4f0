"""The arithmetic between measurements and table."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.bench.table import SummaryRow, loss_difference, markdown, seconds_left, summarize

NAMES = ["trainer", "packed", "ours"]
rates = st.floats(1, 1e6)


def measured(
    variant: str, round_: int, rate: float, losses: Any = (2.0, 1.0), peak: int | None = 2**30
) -> Any:
    return {
        "variant": variant, "round": round_, "tokens_per_second": rate, "peak_memory_bytes": peak,
        "losses": list(losses), "share_of_peak": rate / 1e7,
    }  # fmt: skip


def failed(variant: str, round_: int, why: str = "out of memory") -> dict[str, Any]:
    return {"variant": variant, "round": round_, "error": why}


@st.composite
def rounds(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to five rounds of the three variants, in which some fail."""
    count = draw(st.integers(1, 5))
    return [
        measured(name, number, draw(rates)) if draw(st.booleans()) else failed(name, number)
        for number in range(1, count + 1)
        for name in NAMES
    ]


def by_variant(measurements: list[Any]) -> dict[str, SummaryRow]:
    return {line.variant: line for line in summarize(NAMES, {}, measurements)}


@given(rounds())
def test_variant_with_failures_has_reason_and_counts_rounds(measurements: list[Any]) -> None:
    for variant, line in by_variant(measurements).items():
        own = [one for one in measurements if one["variant"] == variant]
        assert line.rounds == sum("error" not in one for one in own)
        assert (line.tokens_per_second is None) == (line.rounds == 0)
        assert bool(line.reason) == (line.rounds < len(own))
        if line.rounds:
            assert line.slowest <= line.tokens_per_second <= line.fastest


@given(rounds())
def test_baseline_relative_to_itself_is_one(measurements: list[Any]) -> None:
    lines = by_variant(measurements)
    for name in ("trainer", "packed"):
        assert lines[name].ratios[name] == (1.0 if lines[name].rounds else None)
    assert lines["trainer"].loss_difference in (0.0, None)


@given(rounds(), st.lists(st.sampled_from([0.25, 0.5, 2.0, 8.0]), min_size=5, max_size=5))
def test_speed_of_the_machine_in_a_round_leaves_ratios(
    measurements: list[Any], speeds: list[float]
) -> None:
    slowed = [
        one if "error" in one
        else one | {"tokens_per_second": one["tokens_per_second"] * speeds[one["round"] - 1]}
        for one in measurements
    ]  # fmt: skip
    before, after = by_variant(measurements), by_variant(slowed)
    assert all(before[name].ratios == after[name].ratios for name in NAMES)


@given(rounds(), st.randoms())
def test_order_of_measurements_has_no_effect(measurements: list[Any], random: Any) -> None:
    shuffled = list(measurements)
    random.shuffle(shuffled)
    assert by_variant(measurements) == by_variant(shuffled)


def test_ratios_are_medians_of_ratios_inside_a_round() -> None:
    pairs = [(100, 150), (10, 40), (200, 200)]
    measurements = [
        measured(name, number, rate)
        for number, pair in enumerate(pairs, 1)
        for name, rate in zip(("trainer", "ours"), pair, strict=True)
    ]
    line = by_variant(measurements)["ours"]
    assert line.ratios == {"trainer": 1.5, "packed": None}
    assert (line.slowest, line.tokens_per_second, line.fastest) == (40, 150, 200)


def test_round_without_baseline_has_no_ratio() -> None:
    measurements = [
        failed("trainer", 1), measured("ours", 1, 1000),
        measured("trainer", 2, 100), measured("ours", 2, 300),
    ]  # fmt: skip
    lines = by_variant(measurements)
    assert lines["ours"].ratios["trainer"] == 3.0
    assert lines["trainer"].reason == "failed in 1 of 2 rounds: out of memory"


def test_peak_and_loss_difference_are_maxima_of_all_rounds() -> None:
    measurements = [
        measured("trainer", 1, 100, (2.0, 1.0)), measured("ours", 1, 100, (2.25, 1.0), 5),
        measured("trainer", 2, 100, (2.0, 1.0)), measured("ours", 2, 100, (2.0, 0.5), 7),
    ]  # fmt: skip
    line = by_variant(measurements)["ours"]
    assert (line.peak_memory_bytes, line.loss_difference) == (7, 0.5)


def test_infinite_loss_has_no_difference() -> None:
    one, other = measured("ours", 1, 1, (None, 1.0)), measured("trainer", 1, 1, (2.0, 1.0))
    assert loss_difference(one, other) is None


def test_steps_of_other_rows_have_no_difference() -> None:
    one, other = measured("llamafactory-packed", 1, 1, ()), measured("trainer", 1, 1, (2.0, 1.0))
    assert loss_difference(one, other) is None


def test_seconds_left_is_the_sum_of_latest_durations() -> None:
    assert seconds_left(["a", "b"], {}) is None
    assert seconds_left(["b", "c"], {"a": 10.0, "b": 30.0}) == 30.0 + 20.0


@given(rounds())
def test_table_has_a_complete_row_for_every_variant(measurements: list[Any]) -> None:
    skipped = {"trl": "trl is not installed"}
    names = [*NAMES, "trl"]
    lines = summarize(names, skipped, measurements)
    report: Any = {
        "summary": [vars(line) for line in lines],
        "settings": {"threads": 2, "model": "m", "rank": 8, "data": "d", "max_length": 512,
                     "rounds": 5},
        "device": {"board": None, "name": "a CPU", "kind": "cpu"},
        "workload": {"rows": 16, "steps": 2, "timed_tokens": 1234},
        "versions": {"torch": "2"}, "precision": "fp32", "rounds_done": 5,
        "variants": dict.fromkeys(names, "described"),
    }  # fmt: skip
    text = markdown(report).splitlines()
    rows = [line for line in text if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split()[1] for row in rows[2:]] == names
    for line in lines:
        assert not line.reason or f"- {line.variant}: {line.reason}" in text


@pytest.mark.parametrize("peak", [None, 2**31])
def test_unknown_peak_stays_unknown(peak: int | None) -> None:
    line = by_variant([measured("ours", 1, 1.0, peak=peak)])["ours"]
    assert line.peak_memory_bytes == peak
