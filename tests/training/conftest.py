"""A tiny Phi with an adapter, forty rows for it, and everything that a training run needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_bench import Bench

from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import Recipe


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
