"""How the shipped recipes fit: an estimate without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jetson_ft import hub
from jetson_ft import recipe as recipes
from jetson_ft.hardware import detect
from jetson_ft.hardware.boards import BOARDS
from jetson_ft.runs.forecast import forecast_recipe
from jetson_ft.runs.recipe_fits import estimate_fits

BOARD = BOARDS["orin-nano-8gb"]


@pytest.fixture(autouse=True)
def _on_a_board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(detect, "estimate_device", lambda: BOARD.device())


def test_every_shipped_recipe_has_an_estimate_that_equals_the_forecast() -> None:
    fits = estimate_fits()
    assert set(fits) == set(recipes.shipped())
    for name in ("quickstart-zh", "phi-1_5-zh-qlora", "qwen3-4b-qlora"):
        (board,) = forecast_recipe(recipes.load_recipe(name), BOARD.name).devices
        assert board.plan and fits[name].peak_memory_bytes == board.plan.peak_memory_bytes
        assert fits[name].seconds == (board.plan.seconds or 0) + (board.plan.other_seconds or 0)


def test_the_verdicts_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = estimate_fits()["quickstart-zh"].peak_memory_bytes
    for free, verdict in ((peak / 0.8, "fits"), (peak / 0.9, "tight"), (peak / 4, "too_large")):
        device = replace(BOARD.device(), memory_available=int(free))
        monkeypatch.setattr(detect, "estimate_device", lambda device=device: device)
        fit = estimate_fits()["quickstart-zh"]
        # With less memory a smaller plan is taken, which is less tight.
        assert fit.verdict == verdict or (verdict == "tight" and fit.peak_memory_bytes < peak)
    assert fit.seconds is None


def test_what_is_not_here_needs_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "cached_folder", lambda *_: None)
    fits = estimate_fits()
    assert not fits["quickstart-zh"].needs_download
    assert fits["qwen3-0.6b-zh"].needs_download  # the model
    assert fits["phi-1_5-zh"].needs_download  # the rows
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(hub, "cached_folder", lambda *_: tmp_path)
    assert not estimate_fits()["phi-1_5-zh"].needs_download


def test_a_processors_time_is_known_once_its_speed_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = replace(BOARD.device(), kind="cpu", fast_bf16=False, integrated=False, board=None)
    monkeypatch.setattr(detect, "estimate_device", lambda: cpu)
    assert estimate_fits()["quickstart-zh"].seconds is None
    detect.measure_flops("cpu", "fp32")
    assert estimate_fits()["quickstart-zh"].seconds


def test_it_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from jetson_ft.runs.recipe_fits import estimate_fits; estimate_fits();"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
