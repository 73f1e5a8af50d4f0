"""Which rows form which optimizer step, how many steps there are, and the learning rate.

All is a function of recipe and rows alone, so that a resumed run repeats the steps it lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jetson_ft.kernels.packing import Pack, make_packs
from jetson_ft.recipe import TrainRecipe
from jetson_ft.training.state import MEASURED_STEPS, TrainState

if TYPE_CHECKING:
    from datasets import Dataset

IntArray = np.ndarray[Any, np.dtype[np.int64]]


def plan_steps(lengths: Sequence[int] | IntArray, train: TrainRecipe) -> list[IntArray]:
    """Return the row indices of every optimizer step, epoch after epoch.

    Each epoch is a seeded permutation, cut where `tokens_per_step` tokens are reached; what
    is left at its end joins the last step. `max_steps` cuts the list.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    steps: list[IntArray] = []
    for epoch in range(math.ceil(train.epochs)):
        order = np.random.default_rng([train.seed, epoch]).permutation(len(sizes))
        share = min(1.0, train.epochs - epoch)
        order = order[: max(1, round(share * len(order)))]
        start, tokens = 0, 0
        for position, index in enumerate(order):
            tokens += int(sizes[index])
            if tokens >= train.tokens_per_step:
                steps.append(order[start : position + 1])
                start, tokens = position + 1, 0
        rest = order[start:]
        if len(rest) and start:
            steps[-1] = np.concatenate([steps[-1], rest])
        elif len(rest):
            steps.append(rest)
        if train.max_steps and len(steps) >= train.max_steps:
            return steps[: train.max_steps]
    return steps


def rows_of_rank(lengths: Sequence[int] | IntArray, rank: int, size: int) -> list[int]:
    """Return the positions of the rows that one of `size` processes takes of a step; may be none.

    The longest row goes first, each to the process with the fewest tokens (Graham 1969, LPT).
    """
    loads, positions = [0] * size, []
    for position in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        target = loads.index(min(loads))
        loads[target] += int(lengths[position])
        if target == rank:
            positions.append(position)
    return sorted(positions)


@dataclass(frozen=True)
class StepBatch:
    """An optimizer step: this rank's micro-batches of it, and the counts over all ranks."""

    packs: list[Pack]
    rows: int
    tokens: int
    supervised_tokens: int


class StepBatches:
    """The batches of all planned steps (`plan_steps`); each is packed when it is read.

    `capacity` is the tokens of a micro-batch; 0: each row alone.
    """

    def __init__(
        self, rows: Dataset, row_tokens: IntArray, steps: list[IntArray], capacity: int,
        rank: int = 0, size: int = 1, share_prefix: bool = True,
    ) -> None:  # fmt: skip
        self._rows = rows.select_columns(["input_ids", "segments"])
        self._row_tokens, self._steps, self._capacity = row_tokens, steps, capacity
        self._supervised = np.asarray(rows.with_format("numpy")["supervised"][:])
        self._rank, self._size, self._share_prefix = rank, size, share_prefix

    def __getitem__(self, number: int) -> StepBatch:
        step = self._steps[number]
        lengths = self._row_tokens[step]
        own = step[rows_of_rank(lengths, self._rank, self._size)]
        chosen = list(self._rows.select(own))
        return StepBatch(
            packs=list(make_packs(chosen, self._capacity, share=self._share_prefix)),
            rows=len(step),
            tokens=int(lengths.sum()),
            supervised_tokens=int(self._supervised[step].sum()),
        )


def resolve_total_steps(
    state: TrainState,
    train: TrainRecipe,
    step_tokens: Sequence[int],
    heldout_tokens: int,
) -> bool:
    """Set `state.total_steps`; return whether this was the first time for the recipe's limits.

    With `max_minutes` it is set after `MEASURED_STEPS` timed steps, and again after each further
    one, since machines grow slower or faster. `step_tokens` are the tokens of each planned step.
    """
    limits = [train.epochs, train.max_steps, train.max_minutes]
    total, is_settled = len(step_tokens), state.length_limits == limits
    if train.max_minutes:
        if state.step < min(MEASURED_STEPS, total):
            return False
        seconds_left = 60 * train.max_minutes - state.train_seconds
        total = state.step + steps_within(
            step_tokens[state.step :], seconds_left, state.recent_rate
        )
        if is_settled:
            state.total_steps = total
    if is_settled:
        return False
    state.total_steps = max(total, state.step)
    state.length_limits = limits
    passed = (state.step - train.warmup_steps) / max(1, state.total_steps - train.warmup_steps)
    state.lr_decay = min(1.0, max(0.0, passed))
    state.eval_every = choose_eval_every(train, step_tokens, heldout_tokens, state.total_steps)
    state.stopped_early, state.evals_without_improvement = False, 0
    return True


def steps_within(step_tokens: Sequence[int], seconds: float, tokens_per_second: float) -> int:
    """Return how many of the steps to come end nearest to the time; 0 if half of one is too much.

    `step_tokens` are the tokens of each step to come.
    """
    tokens = np.asarray(step_tokens, dtype=float)
    middles = (np.cumsum(tokens) - tokens / 2) / tokens_per_second
    return int(np.searchsorted(middles, seconds, side="right"))


def advance_lr(state: TrainState, train: TrainRecipe) -> None:
    """Count the step just made in the learning rate's schedule.

    The rest of the schedule is shared equally by the steps that are left at present, so that it
    ends with the last step also where `max_minutes` has changed their number.
    """
    if state.step > train.warmup_steps and state.total_steps is not None:
        steps_left = max(1, state.total_steps - state.step + 1)
        state.lr_decay += (1 - state.lr_decay) / steps_left


def lr_multiplier(state: TrainState, train: TrainRecipe) -> float:
    """Return the share of the peak learning rate for the next step."""
    if state.step < train.warmup_steps:
        return (state.step + 1) / (train.warmup_steps + 1)
    if train.lr_scheduler == "constant":
        return 1.0
    is_linear = train.lr_scheduler == "linear"
    return 1 - state.lr_decay if is_linear else 0.5 * (1 + math.cos(math.pi * state.lr_decay))


def choose_eval_every(
    train: TrainRecipe, step_tokens: Sequence[int], heldout_tokens: int, total: int
) -> int:
    """Return the steps between evaluations; `auto`: such that they take about a tenth of the time.

    A forward pass alone is taken as a third of a training step. Between 1 and 20 evaluations per
    run, the last one at its end.
    """
    if train.eval_every != "auto":
        return train.eval_every
    affordable = 0.1 * sum(step_tokens[:total]) / max(1.0, heldout_tokens / 3)
    count = int(min(20, max(1, affordable)))
    return max(1, math.ceil(total / count))
