"""What a training run counts: the state that a checkpoint stores, and one step's statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

MEASURED_STEPS = 5  # whose rate `recent_rate` is; `max_minutes` is no number of steps before


@dataclass(frozen=True)
class StepStats:
    """A step's figures, the same on all ranks. Seconds and joules."""

    seconds: float  # of the step, as rank 0 measured them
    seconds_since_save: float  # as rank 0 measured them
    stop_requested: bool  # on any rank
    joules: float | None  # of all machines; None: unknown on one of them


@dataclass
class TrainState:
    """The counters of a run: all that a resumed run needs besides the tensors."""

    step: int = 0  # optimizer steps made
    # None until `max_minutes` has become a number of steps; settled again after each step since
    total_steps: int | None = None
    # epochs, max_steps and max_minutes that `total_steps` was computed from
    length_limits: list[float | None] | None = None
    lr_decay: float = 0.0  # share of the learning rate's schedule after the warm-up, 0 to 1
    step_rates: list[float] = field(default_factory=list)  # newest steps' tokens per second
    eval_every: int | None = None
    evaluated_step: int = 0  # of the newest held-out loss that counts; 0: none yet
    tokens: int = 0
    supervised_tokens: int = 0
    rows: int = 0
    train_seconds: float = 0.0  # in optimizer steps alone
    energy_joules: float | None = 0.0  # in optimizer steps alone; None: unknown in at least one
    best_step: int | None = None
    best_loss: float | None = None
    evals_without_improvement: int = 0
    stopped_early: bool = False

    def add_step(self, batch: Any, stats: StepStats) -> None:
        """Count one more step (a `batches.StepBatch`)."""
        self.step += 1
        self.rows += batch.rows
        self.tokens += batch.tokens
        self.supervised_tokens += batch.supervised_tokens
        self.train_seconds += stats.seconds
        self.step_rates = [
            *self.step_rates[1 - MEASURED_STEPS :], batch.tokens / max(1e-9, stats.seconds)
        ]  # fmt: skip
        if self.energy_joules is not None:
            self.energy_joules = None if stats.joules is None else self.energy_joules + stats.joules

    def add_evaluation(self, loss: float, patience: int | None) -> None:
        """Count a held-out loss; stop early after `patience` in a row that aren't lower."""
        self.evaluated_step = self.step
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.evals_without_improvement = 0
        else:
            self.evals_without_improvement += 1
            self.stopped_early = patience is not None and self.evals_without_improvement >= patience

    @property
    def recent_rate(self) -> float:
        """Tokens per second, the median of the newest steps: outliers don't count."""
        return median(self.step_rates) if self.step_rates else self.tokens_per_second

    @property
    def tokens_per_second(self) -> float:
        """Mean over all training steps."""
        return self.tokens / max(1e-9, self.train_seconds)

    @property
    def evaluation_due(self) -> bool:
        """Whether the held-out loss of this step is wanted and not counted yet."""
        wanted = self.is_complete or (self.eval_every and self.step % self.eval_every == 0)
        return bool(wanted) and self.evaluated_step != self.step

    @property
    def is_complete(self) -> bool:
        """Whether no step is left to make."""
        reached = self.total_steps is not None and self.step >= self.total_steps
        return self.stopped_early or reached
