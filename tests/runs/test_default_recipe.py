"""The recipe that runs when none is named."""

from __future__ import annotations

import pytest

from jetson_ft import hub
from jetson_ft import recipe as recipes
from jetson_ft.hardware import detect
from jetson_ft.runs import manager


@pytest.mark.parametrize(
    ("gpu", "reachable", "name", "words"),
    [
        (True, True, "phi-1_5-zh-quick", "at most 60 minutes"),
        (True, False, "quickstart-zh", "out of reach"),
        (False, True, "quickstart-zh", "no CUDA GPU here"),
        (False, False, "quickstart-zh", "no CUDA GPU here"),
    ],
)
def test_gpu_and_hub_decide_the_recipe_and_give_a_reason(
    gpu: bool, reachable: bool, name: str, words: str
) -> None:
    chosen, why = manager.default_recipe(lambda: gpu, lambda: reachable)
    assert chosen == name
    assert words in why
    assert "\n" not in why


def test_unreachable_hub_is_named_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    _, why = manager.default_recipe(lambda: True, lambda: False)
    assert "https://mirror.example" in why


def test_no_gpu_needs_no_hub() -> None:
    def never() -> bool:
        raise AssertionError("called")

    manager.default_recipe(lambda: False, never)


def test_default_recipes_are_shipped_and_are_as_the_reason_says() -> None:
    assert recipes.load_recipe("quickstart-zh").model == "embedded"
    quick = recipes.load_recipe("phi-1_5-zh-quick")
    assert quick.model == "microsoft/phi-1_5"
    assert 0 < quick.train.max_minutes <= 60


def test_defaults_are_the_real_checks() -> None:
    assert manager.default_recipe.__defaults__ == (detect.has_cuda_gpu, hub.reachable)
