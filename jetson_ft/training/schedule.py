"""Which rows form which optimizer step, how many steps there are, and the learning rate.

Everything here is a function of the recipe and the rows alone, so that a resumed run
repeats the steps it lost and goes on with the ones it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jetson_ft.recipe import TrainRecipe

MEASURED_STEPS = 5  # timed before `max_minutes` becomes a number of steps

Array = np.ndarray[Any, np.dtype[np.int64]]


def plan_steps(lengths: Sequence[int] | Array, train: TrainRecipe) -> list[Array]:
    """Row indices of every optimizer step, epoch after epoch.

    Each epoch is a seeded permutation, cut where `tokens_per_step` tokens are reached; what
    is left at its end joins the last step. `max_steps` cuts the list.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    steps: list[Array] = []
    for epoch in range(math.ceil(train.epochs)):
        order = np.random.default_rng([train.seed, epoch]).permutation(len(sizes))
        share = min(1.0, train.epochs - epoch)
        order = order[: max(1, round(share * len(order)))]
        steps += _cut(order, sizes, train.tokens_per_step)
        if train.max_steps and len(steps) >= train.max_steps:
            return steps[: train.max_steps]
    return steps


def _cut(order: Array, sizes: Array, tokens_per_step: int) -> list[Array]:
    steps, start, tokens = [], 0, 0
    for position, index in enumerate(order):
        tokens += int(sizes[index])
        if tokens >= tokens_per_step:
            steps.append(order[start : position + 1])
            start, tokens = position + 1, 0
    if start < len(order):
        rest = order[start:]
        if steps:
            steps[-1] = np.concatenate([steps[-1], rest])
        else:
            steps.append(rest)
    return steps


def share(lengths: Sequence[int] | Array, rank: int, size: int) -> list[int]:
    """Positions of the rows that one of `size` processes takes of a step; may be none.

    The longest row goes first, each to whoever has the fewest tokens (Graham 1969, LPT).
    """
    loads, mine = [0] * size, []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        taker = loads.index(min(loads))
        loads[taker] += int(lengths[place])
        if taker == rank:
            mine.append(place)
    return sorted(mine)


def steps_within(
    tokens: Sequence[int], done: int, tokens_per_second: float, max_minutes: float
) -> int:
    """How many of the planned steps fit into the time; never fewer than are done, plus one.

    Args:
        tokens: of each planned step.
        done: steps already made.
    """
    seconds = np.cumsum(np.asarray(tokens)) / tokens_per_second
    fitting = int(np.searchsorted(seconds, max_minutes * 60, side="right"))
    return min(len(tokens), max(done + 1, fitting))


def rate_factor(step: int, total: int | None, train: TrainRecipe) -> float:
    """Share of the peak learning rate at a step (from 0); total None: not fixed yet."""
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    if total is None or train.schedule == "constant":
        return 1.0
    passed = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    passed = min(1.0, max(0.0, passed))
    return 1.0 - passed if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * passed))


def choose_eval_every(step_tokens: Sequence[int], heldout_tokens: int, total: int) -> int:
    """Steps between measurements so that they cost about a tenth of the training time.

    A forward pass alone is taken as a third of a training step. Between 1 and 20
    measurements a run, the last one at its end.
    """
    trained = sum(step_tokens[:total])
    affordable = 0.1 * trained / max(1.0, heldout_tokens / 3)
    count = int(min(20, max(1, affordable)))
    return max(1, math.ceil(total / count))
