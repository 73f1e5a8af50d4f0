"""A tiny Phi with an adapter, forty rows for it, and everything that a training needs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.device.monitor import Monitor
from jetson_ft.models.resolve import Base
from jetson_ft.recipe import LoraRecipe, Recipe


class Bench:
    """Makes models and jobs over the same rows; keeps the events of the last job."""

    def __init__(self, folder: Path, rows: Any) -> None:
        self.folder, self.rows = folder, rows
        self.events: list[dict[str, Any]] = []

    def model(self, dropout: float = 0.0) -> Any:
        """A fresh adapter on the tiny Phi; the same one every time."""
        from jetson_ft.models import adapter, load

        base = load.load_model(Base("tiny", self.folder), load.Weights("fp32"), "cpu")
        return adapter.attach(base, LoraRecipe(rank=4, dropout=dropout), seed=0)

    def job(
        self,
        checkpoints: Path,
        stop: Callable[[], bool] = lambda: False,
        capacity: int = 2048,
        recompute: bool = False,
        monitor: Monitor | None = None,
        max_temperature: float = 0.0,
        **train: Any,
    ) -> Any:
        """A job whose steps have about 220 tokens: nine steps an epoch."""
        from jetson_ft.data.tokens import token_counts
        from jetson_ft.models.packing import packs
        from jetson_ft.training.planner import Plan
        from jetson_ft.training.trainer import Job

        self.events = []
        settings = {"epochs": 1.0, "tokens_per_step": 220, "learning_rate": 1e-2} | train
        return Job(
            train_rows=self.rows.train,
            train_tokens=token_counts(self.rows.train),
            heldout_packs=list(packs(list(self.rows.heldout), capacity)),
            heldout_tokens=int(token_counts(self.rows.heldout).sum()),
            heldout_characters=self.rows.heldout_characters,
            recipe=Recipe.model_validate({"train": settings}).train,
            plan=Plan(micro_batch_tokens=capacity, checkpointing=recompute),
            checkpoints=checkpoints,
            device="cpu",
            emit=lambda kind, **fields: self.events.append({"kind": kind, **fields}),
            stop_requested=stop,
            monitor=monitor or Monitor(),
            max_temperature=max_temperature,
        )

    def fit(self, model: Any, job: Any, resume: Path | None = None) -> Any:
        """Trains with rows packed, as a run does."""
        from jetson_ft.models import attention
        from jetson_ft.training import trainer

        with attention.packed(model):
            return trainer.fit(model, job, resume)

    def of(self, kind: str, key: str) -> list[Any]:
        """One field of all events of a kind."""
        return [event[key] for event in self.events if event["kind"] == kind]


@pytest.fixture(scope="session")
def bench(tiny_phi: Path, rows_file: Path) -> Bench:
    """The rows are read and tokenised once a session."""
    import torch

    from jetson_ft.runs.pipeline import prepare_rows

    torch.set_num_threads(1)  # so small a model is slower with more
    gc.freeze()  # Trainer collects garbage at its start: not through all that is imported
    recipe = Recipe.model_validate(
        {"model": str(tiny_phi), "data": {"train": str(rows_file), "heldout": 6}}
    )
    return Bench(tiny_phi, prepare_rows(recipe, Base("tiny", tiny_phi)))
