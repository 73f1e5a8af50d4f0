"""The benchmark that is run by hand, on the tiny Phi."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.models import adapter, load
from jetson_ft.models.resolve import Base
from jetson_ft.recipe import LoraRecipe


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "phi_gelu.py"))


def test_rows_fill_the_step(script: dict[str, Any]) -> None:
    pack = script["make_pack"](1000, 0, 259, "cpu")
    assert 984 < pack.tokens == sum(pack.row_lengths) <= 1000
    assert len(pack.row_lengths) > 1
    assert 0.5 < len(pack.targets) / pack.tokens < 1


def test_both_forms_are_timed_in_turns(
    script: dict[str, Any], tiny_phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load.load_model(Base("tiny", tiny_phi), load.Weights("fp32"), "cpu")
    model = adapter.attach(base, LoraRecipe(rank=4), seed=0).train()
    activations = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation"]
    seen: list[tuple[bool, ...]] = []
    steps = script["_steps"]

    def look(*given: Any) -> None:
        seen.append(tuple("forward" in vars(module) for module in activations))
        steps(*given)

    monkeypatch.setitem(script["compare"].__globals__, "_steps", look)
    packs = [script["make_pack"](128, seed, 259, "cpu") for seed in range(2)]
    found = script["compare"](model, packs, warmup=1, rounds=2)
    own, fused = (False, False), (True, True)
    assert seen == [own, own, fused, fused] * 2  # warm-up and timed
    assert all(speed > 0 for pair in found for speed in pair)
