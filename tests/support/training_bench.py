"""A tiny model and training jobs over the same rows, for tests and their worker processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.events import KINDS, to_json
from jetson_ft.hardware.monitor import Monitor
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import LoraRecipe, Recipe


def field_values(events: list[dict[str, Any]], kind: str, key: str) -> list[Any]:
    """Return one field of all events of a kind, which must exist."""
    assert kind in KINDS
    return [event[key] for event in events if event["kind"] == kind]


class Bench:
    """Models and jobs over the same rows, and the events of the last job."""

    def __init__(self, folder: Path, rows: Any) -> None:
        self.folder, self.rows = folder, rows
        self.events: list[dict[str, Any]] = []

    def model(self, dropout: float = 0.0) -> Any:
        """Return a fresh adapter on the tiny Phi; the same one every time."""
        from jetson_ft import adapter
        from jetson_ft.models import loading

        base = loading.load_model(
            BaseModelFiles("tiny", self.folder), loading.WeightFormat("fp32"), "cpu"
        )
        return adapter.attach_adapter(base, LoraRecipe(rank=4, dropout=dropout), seed=0)

    def job(
        self,
        checkpoints: Path,
        stop: Callable[[], bool] = lambda: False,
        capacity: int = 2048,
        recompute: bool = False,
        monitor: Monitor | None = None,
        max_temperature: float | None = None,
        loraplus_lr_ratio: float = 1.0,
        **train: Any,
    ) -> Any:
        """Return a job whose steps have about 220 tokens: nine steps an epoch."""
        from jetson_ft.data.tokenize import token_counts
        from jetson_ft.training.loop import TrainingJob
        from jetson_ft.training.planner import Plan

        self.events = []
        settings = {"epochs": 1.0, "tokens_per_step": 220, "learning_rate": 1e-2} | train
        return TrainingJob(
            train_rows=self.rows.train,
            train_tokens=token_counts(self.rows.train),
            heldout_rows=list(self.rows.heldout),
            heldout_characters=self.rows.heldout_characters,
            recipe=Recipe.model_validate({"train": settings}).train,
            plan=Plan(micro_batch_tokens=capacity, checkpointing=recompute),
            checkpoints=checkpoints,
            device="cpu",
            emit=lambda event: self.events.append(to_json(event)),
            stop_requested=stop,
            monitor=monitor or Monitor(),
            max_temperature=max_temperature,
            loraplus_lr_ratio=loraplus_lr_ratio,
        )

    def train(self, model: Any, job: Any, resume: Path | None = None) -> Any:
        """Train with packed rows, as a run does."""
        from jetson_ft.kernels import attention
        from jetson_ft.training import loop

        with attention.use_packed_attention(model):
            return loop.train(model, job, resume)

    def values(self, kind: str, key: str) -> list[Any]:
        """Return one field of the last job's events of a kind."""
        return field_values(self.events, kind, key)


@pytest.fixture(scope="session")
def make_bench(rows_file: Path) -> Callable[[Path], Bench]:
    """Return a function that reads and tokenizes the rows for a model's folder."""
    import torch

    from jetson_ft.data.prepare import prepare_rows
    from jetson_ft.models.loading import load_tokenizer

    torch.set_num_threads(1)  # so small a model is slower with more

    def make(folder: Path) -> Bench:
        data = Recipe.model_validate({"data": {"train": str(rows_file), "heldout": 6}}).data
        tokenizer = load_tokenizer(BaseModelFiles("tiny", folder))
        return Bench(folder, prepare_rows(data, tokenizer))

    return make


@pytest.fixture(scope="session")
def bench(make_bench: Callable[[Path], Bench], tiny_phi: Path) -> Bench:
    """The tiny Phi's bench, made once a session."""
    return make_bench(tiny_phi)
