"""The adapter's updates by their factors, against the whole matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import tiny_model

from jetson_ft.adapter import attach_adapter
from jetson_ft.errors import UserError
from jetson_ft.inside.adapter_change import (
    compute_adapter_change,
    effective_rank,
    rank_of_energy,
    singular_values,
)
from jetson_ft.recipe import LoraRecipe


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_singular_values_are_those_of_the_whole_product(
    outputs: int, inputs: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(size, generator=generator) for size in ((outputs, rank), (rank, inputs)))
    whole = torch.linalg.svdvals(0.5 * b @ a)
    values = singular_values(b, a, 0.5)
    count = min(len(whole), len(values))
    torch.testing.assert_close(values[:count], whole[:count], rtol=1e-4, atol=1e-5)
    assert float(values[count:].sum() + whole[count:].sum()) < 1e-4


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    p = [0.75, 0.25]
    entropy = -sum(each * math.log(each) for each in p)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))


def test_rank_of_energy_is_the_fewest_values() -> None:
    assert rank_of_energy(torch.tensor([3.0, 1.0]), 0.9) == 1  # 9 of 10
    assert rank_of_energy(torch.tensor([2.9, 1.0]), 0.9) == 2
    assert rank_of_energy(torch.ones(10), 0.9) == 9
    assert rank_of_energy(torch.zeros(3), 0.9) == 0


@pytest.fixture
def adapted() -> Any:
    model = attach_adapter(tiny_model("llama"), LoraRecipe(rank=4, alpha=8, dropout=0.0), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_change_is_that_of_the_merged_weights(adapted: Any) -> None:
    change = compute_adapter_change(adapted)
    assert change.scale == 2 and change.rank == 4 and not change.is_dora
    for layer in change.layers:
        module = adapted.get_submodule(f"base_model.model.{layer.path}")
        update = module.get_delta_weight("default")
        base = module.get_base_layer().weight
        assert layer.norm == pytest.approx(float(update.detach().norm()), rel=1e-3)
        assert layer.relative_norm == pytest.approx(
            float((update.norm() / base.norm()).detach()), rel=1e-3
        )
        assert 1 <= layer.rank_90 <= 4 and 1 <= layer.effective_rank <= 4
    assert {layer.layer for layer in change.layers} == {0, 1}
    assert set(change.targets) >= {"q_proj", "down_proj"}
    assert len(change.to_json()["layers"]) == len(change.layers)


def test_new_adapter_changes_nothing() -> None:
    model = attach_adapter(tiny_model("llama"), LoraRecipe(rank=4), seed=1)
    change = compute_adapter_change(model)
    assert {layer.norm for layer in change.layers} == {0}
    assert change.mean_effective_rank == 0


def test_model_without_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="no adapter"):
        compute_adapter_change(tiny_model("llama"))
