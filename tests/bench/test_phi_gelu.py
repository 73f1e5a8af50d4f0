"""The benchmark that is run by hand, on the tiny Phi."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from jetson_ft import adapter
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import LoraRecipe


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "phi_gelu.py"))


def test_rows_fill_the_step(script: dict[str, Any]) -> None:
    pack = script["make_pack"](1000, 0, 259, "cpu")
    assert 984 < pack.tokens == sum(pack.row_lengths) <= 1000
    assert len(pack.row_lengths) > 1
    assert 0.5 < len(pack.targets) / pack.tokens < 1


def test_both_forms_are_timed_in_turns_with_all_other_layers_fused(
    script: dict[str, Any], tiny_phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loading.load_model(BaseModelFiles("tiny", tiny_phi), loading.WeightFormat("fp32"), "cpu")
    model = adapter.attach_adapter(base, LoraRecipe(rank=4), seed=0).train()
    kinds = ("NewGELUActivation", "LayerNorm", "PhiAttention")
    states: list[tuple[set[bool], ...]] = []
    steps = script["_steps"]

    def record_and_run(*args: Any) -> None:
        fused = [(type(m).__name__, "forward" in vars(m)) for m in model.modules()]
        states.append(tuple({state for name, state in fused if name == kind} for kind in kinds))
        steps(*args)

    monkeypatch.setitem(script["compare"].__globals__, "_steps", record_and_run)
    packs = [script["make_pack"](128, seed, 259, "cpu") for seed in range(2)]
    speeds = script["compare"](model, packs, warmup=1, rounds=2)
    own, fused = ({False}, {True}, {True}), ({True}, {True}, {True})
    assert states == [own, own, fused, fused] * 2  # warm-up and timed
    assert all(speed > 0 for pair in speeds for speed in pair)
