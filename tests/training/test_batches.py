"""Whole rows, each once an epoch, in steps that a seed alone decides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.recipe import Recipe, TrainRecipe
from jetson_ft.training.batches import (
    StepBatch,
    advance_lr,
    choose_eval_every,
    lr_multiplier,
    plan_steps,
    resolve_total_steps,
    rows_of_rank,
    steps_within,
)
from jetson_ft.training.state import StepStats, TrainState

lengths_of_rows = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def train(**values: Any) -> TrainRecipe:
    return Recipe.model_validate({"train": values}).train


@given(lengths_of_rows, st.integers(1, 500), st.integers(1, 3), st.integers(0, 5))
def test_every_row_comes_once_an_epoch(
    lengths: list[int], size: int, epochs: int, seed: int
) -> None:
    steps = plan_steps(lengths, train(tokens_per_step=size, epochs=float(epochs), seed=seed))
    order = np.concatenate(steps).tolist()
    for epoch in range(epochs):
        rows = order[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(rows) == list(range(len(lengths)))


@given(lengths_of_rows, st.integers(1, 500))
def test_steps_reach_their_tokens_and_no_more_than_needed(lengths: list[int], size: int) -> None:
    steps = plan_steps(lengths, train(tokens_per_step=size, epochs=1.0))
    sizes = [[lengths[row] for row in step] for step in steps]
    if sum(lengths) >= size:
        assert all(sum(step) >= size for step in sizes)
    assert all(sum(step[:-1]) < size for step in sizes[:-1])


@given(lengths_of_rows, st.integers(0, 9))
def test_same_seed_same_steps(lengths: list[int], seed: int) -> None:
    recipe = train(seed=seed, epochs=2.0, tokens_per_step=200)
    first, second = plan_steps(lengths, recipe), plan_steps(np.asarray(lengths), recipe)
    assert [step.tolist() for step in first] == [step.tolist() for step in second]


def test_seeds_and_epochs_differ_in_order() -> None:
    steps = {
        seed: plan_steps([10] * 50, train(seed=seed, epochs=2.0, tokens_per_step=500))
        for seed in (0, 1)
    }
    orders = [step.tolist() for epoch in steps.values() for step in epoch]
    assert len(orders) == 4 and len({tuple(order) for order in orders}) == 4


def test_the_order_is_pinned() -> None:
    """A run resumed under a later release must repeat the same steps."""
    steps = plan_steps([5] * 6, train(seed=7, epochs=1.0, tokens_per_step=10))
    assert [step.tolist() for step in steps] == [[5, 2], [0, 4], [1, 3]]


def test_fractional_epochs_take_a_share_of_the_last_one() -> None:
    lengths = [1] * 40
    steps = plan_steps(lengths, train(epochs=1.25, tokens_per_step=1))
    assert len(steps) == 50
    assert len({int(step[0]) for step in steps[40:]}) == 10
    assert [s.tolist() for s in steps[:40]] == [
        s.tolist() for s in plan_steps(lengths, train(epochs=1.0, tokens_per_step=1))
    ]


@pytest.mark.parametrize("epochs", [0.001, 0.02])
def test_a_share_is_never_empty(epochs: float) -> None:
    assert [len(step) for step in plan_steps([7] * 9, train(epochs=epochs))] == [1]


def test_max_steps_cuts_the_plan_and_changes_nothing_before() -> None:
    lengths = list(range(1, 60))
    full = plan_steps(lengths, train(epochs=3.0, tokens_per_step=100))
    cut = plan_steps(lengths, train(epochs=3.0, tokens_per_step=100, max_steps=20))
    assert len(cut) == 20 < len(full)
    assert [s.tolist() for s in cut] == [s.tolist() for s in full[:20]]


def test_longer_runs_begin_alike() -> None:
    lengths = list(range(1, 60))
    short = plan_steps(lengths, train(epochs=2.0, tokens_per_step=100))
    longer = plan_steps(lengths, train(epochs=3.0, tokens_per_step=100))
    assert [s.tolist() for s in longer[: len(short)]] == [s.tolist() for s in short]


@pytest.mark.parametrize(
    ("tokens", "seconds", "steps"),
    [
        ([600] * 10, 300.0, 5),  # a step a minute
        ([600] * 10, 329.0, 5),  # nearer to five than to six
        ([600] * 10, 331.0, 6),
        ([600] * 10, 3600.0, 10),  # never more than planned
        ([600] * 10, 29.0, 0),
        ([600] * 10, -1.0, 0),
        ([], 60.0, 0),
        ([60, 600, 6000], 70.0, 2),  # long steps count as long ones
    ],
)
def test_steps_end_nearest_to_the_time(tokens: list[int], seconds: float, steps: int) -> None:
    assert steps_within(tokens, seconds, tokens_per_second=10.0) == steps


def simulate(
    recipe: TrainRecipe, seconds: Callable[[TrainState], float], planned: int = 1000,
    state: TrainState | None = None, stop: int | None = None,
) -> tuple[TrainState, list[float]]:  # fmt: skip
    """Return the end of a run of steps of 100 tokens, and the learning rates as shares of the peak.

    `seconds` returns a step's time; the run is stopped after the step number `stop`.
    """
    state, rates = deepcopy(state) if state else TrainState(), []
    resolve_total_steps(state, recipe, [100] * planned, 0)
    while not state.is_complete and state.step != stop:
        rates.append(lr_multiplier(state, recipe))
        batch = StepBatch(packs=[], rows=1, tokens=100, supervised_tokens=50)
        state.add_step(batch, StepStats(seconds(state), 0.0, False, None))
        if not resolve_total_steps(state, recipe, [100] * planned, 0):
            advance_lr(state, recipe)
    return state, rates


@pytest.mark.parametrize("before", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_training_takes_the_minutes_when_the_speed_changes(
    before: float, factor: float, scheduler: str
) -> None:
    """Also where the first step is ten times as slow, and one in the middle."""
    recipe = train(max_minutes=4.0, lr_scheduler=scheduler)

    def seconds(state: TrainState) -> float:
        usual = before * (factor if state.train_seconds > 120 else 1.0)
        return 10 * usual if state.step in (0, 20) else usual

    state, rates = simulate(recipe, seconds)
    assert state.train_seconds == pytest.approx(240, rel=0.02 if before < 4 else 0.1)
    decayed = rates[recipe.warmup_steps :]
    assert decayed == sorted(decayed, reverse=True)
    assert max(rates) == 1.0 and rates[-1] < 0.07


def test_resumed_run_goes_on_with_steps_and_schedule_of_the_stopped_one() -> None:
    recipe = train(max_minutes=1.0)
    whole, rates = simulate(recipe, lambda _: 0.5)
    stopped, before = simulate(recipe, lambda _: 0.5, stop=40)
    state = TrainState(**json.loads(json.dumps(asdict(stopped))))
    resumed, after = simulate(recipe, lambda _: 0.5, state=state)
    assert (resumed, before + after) == (whole, rates)


def test_more_minutes_raise_steps_and_rate_of_a_resumed_run() -> None:
    short, rates = simulate(train(max_minutes=1.0), lambda _: 0.5)
    longer, again = simulate(train(max_minutes=2.0), lambda _: 0.5, state=short)
    assert (short.step, longer.step) == (120, 240)
    assert again[0] > rates[-1] > again[-1]


def factors(total: int, **values: Any) -> list[float]:
    return simulate(train(**values), lambda _: 1.0, planned=total)[1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rate_rises_over_the_warmup_from_above_zero(schedule: str) -> None:
    rising = factors(20, lr_scheduler=schedule, warmup_steps=4)[:5]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.5, 0.5 * (1 + math.cos(math.pi * 9 / 10))), ("linear", 0.5, 0.1),
     ("constant", 1.0, 1.0)],
)  # fmt: skip
def test_rate_falls_as_asked(schedule: str, middle: float, last: float) -> None:
    rates = factors(10, lr_scheduler=schedule, warmup_steps=0)
    assert (rates[0], rates[5], rates[9]) == pytest.approx((1.0, middle, last))
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_rate_stays_up_until_the_length_is_known() -> None:
    rates = simulate(train(warmup_steps=2, max_minutes=60.0), lambda _: 1.0, stop=5)[1]
    assert rates[2:] == [1.0] * 3


@given(st.integers(1, 60), st.integers(0, 70), st.sampled_from(["cosine", "linear"]))
def test_rate_follows_the_schedule_of_a_fixed_number_of_steps(
    total: int, warmup: int, scheduler: str
) -> None:
    for step, rate in enumerate(factors(total, warmup_steps=warmup, lr_scheduler=scheduler)):
        passed = (step - warmup) / max(1, total - warmup)
        decayed = 1 - passed if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * passed))
        assert rate == pytest.approx((step + 1) / (warmup + 1) if step < warmup else decayed)


@pytest.mark.parametrize(
    ("step_tokens", "heldout", "total", "every"),
    [
        ([1000] * 100, 3000, 100, 10),  # 10 forward passes of 1000 steps' worth: a tenth
        ([1000] * 100, 300, 100, 5),  # cheap: twenty times, not more
        ([1000] * 100, 10**9, 100, 100),  # dear: at the end alone
        ([1000] * 3, 10**9, 3, 3),
        ([1000], 10, 1, 1),
        ([1000] * 100, 0, 40, 2),  # only the steps that will be made count
    ],
)
def test_measurements_cost_about_a_tenth(
    step_tokens: list[int], heldout: int, total: int, every: int
) -> None:
    assert choose_eval_every(train(), step_tokens, heldout, total) == every
    assert choose_eval_every(train(eval_every=7), step_tokens, heldout, total) == 7


# --- shares of several processes -----------------------------------------------------------------


@given(st.lists(st.integers(1, 900), max_size=40), st.integers(1, 5))
def test_every_row_of_a_step_is_one_processs(lengths: list[int], size: int) -> None:
    shares = [rows_of_rank(lengths, rank, size) for rank in range(size)]
    assert sorted(place for part in shares for place in part) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in part) for part in shares]
    # Who was given a row had the fewest tokens before it.
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_process_alone_takes_all_in_their_order() -> None:
    assert rows_of_rank([3, 9, 5], 0, 1) == [0, 1, 2]
