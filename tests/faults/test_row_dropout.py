"""The masks of dropout belong to the rows: another plan gives the same adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_bench import Bench

from jetson_ft.training import loop

P = 0.1
Adapter = dict[str, torch.Tensor]


def train(
    bench: Bench, home: Path, share_prefix: bool = True, packed: bool = True,
    setup: Callable[[Any], Any] = lambda model: model, **plan: Any,
) -> Adapter:  # fmt: skip
    """Return the adapter after five steps with dropout."""
    model = setup(bench.model(dropout=P))
    job = replace(bench.job(home, max_steps=5, **plan), share_prefix=share_prefix)
    if packed:
        bench.train(model, job)
    else:
        loop.train(model, job)
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def difference(first: Adapter, second: Adapter) -> float:
    """Return the norm of the difference, relative to the norm of the first."""
    pairs = [(first[name].double(), second[name].double()) for name in first]
    change = sum((a - b).square().sum() for a, b in pairs)
    return float((change / sum(a.square().sum() for a, _ in pairs)).sqrt())


PLANS: dict[str, dict[str, Any]] = {
    "small micro-batches": {"capacity": 64},
    "each row alone": {"capacity": 0},
    "recomputed": {"recompute": True},
    "no shared prefix": {"share_prefix": False},
    "small, recomputed, no shared prefix": {
        "capacity": 100, "recompute": True, "share_prefix": False
    },
    "the model's own attention": {"capacity": 0, "packed": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Return the adapter of the plan with one micro-batch a step."""
    return train(bench, tmp_path_factory.mktemp("whole"))


@pytest.mark.promise(57)
@pytest.mark.parametrize("name", PLANS)
def test_another_plan_gives_the_same_adapter(
    bench: Bench, trained: Adapter, tmp_path: Path, name: str
) -> None:
    assert difference(trained, train(bench, tmp_path, **PLANS[name])) < 1e-5
