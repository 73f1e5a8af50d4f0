"""The catalog's dimensions are those of the models that transformers builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jetson_ft.errors import UserError
from jetson_ft.models import catalog, dims
from jetson_ft.models.catalog import MODELS
from jetson_ft.models.files import BaseModelFiles

# Millions of parameters of the text models, as published.
PUBLISHED = {
    "embedded": 134.5, "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 362, "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1711,
    "HuggingFaceTB/SmolLM3-3B": 3075, "microsoft/phi-1_5": 1418,
    "microsoft/Phi-4-mini-instruct": 3836, "Qwen/Qwen2.5-0.5B": 494,
    "Qwen/Qwen2.5-0.5B-Instruct": 494, "Qwen/Qwen2.5-1.5B": 1544,
    "Qwen/Qwen2.5-1.5B-Instruct": 1544, "Qwen/Qwen3-0.6B": 596, "Qwen/Qwen3-1.7B": 1720,
    "Qwen/Qwen3-4B": 4022, "Qwen/Qwen3-8B": 8191, "Qwen/Qwen3.5-0.8B": 752,
    "Qwen/Qwen3.5-2B": 1882, "Qwen/Qwen3.5-4B": 4206, "Qwen/Qwen3.5-9B": 8954,
    "meta-llama/Llama-3.2-1B-Instruct": 1236, "meta-llama/Llama-3.2-3B-Instruct": 3213,
    "google/gemma-3-270m": 268, "google/gemma-3-270m-it": 268, "google/gemma-3-1b-it": 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_dimensions_equal_those_of_the_built_model(name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**MODELS[name].config)
    assert dims.dims_from_config(config) == MODELS[name].dims


def test_parameters_are_within_1_percent_of_the_published_ones() -> None:
    assert set(PUBLISHED) == set(MODELS)
    counts = {name: model.dims.parameters / 1e6 for name, model in MODELS.items()}
    assert counts == pytest.approx(PUBLISHED, rel=0.01)


def test_lora_on_all_linears_of_qwen3_5_has_the_published_parameters() -> None:
    hybrid = MODELS["Qwen/Qwen3.5-9B"].dims
    assert sum(linear.count for linear in hybrid.adapted("all-linear")) == 248
    assert hybrid.lora_parameters(16) == 43_278_336


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("Qwen/Qwen3-0.6B", 1.503),  # its files have the tied head too
        ("Qwen/Qwen3-1.7B", 4.063),
        ("Qwen/Qwen3-8B", 16.38),
        ("Qwen/Qwen3.5-9B", 19.31),  # with a vision tower
        ("meta-llama/Llama-3.2-1B-Instruct", 2.472),
        ("microsoft/phi-1_5", 2.837),
    ],
)
def test_size_on_disk_is_the_published_one(name: str, gigabytes: float) -> None:
    assert MODELS[name].file_bytes / 1e9 == pytest.approx(gigabytes, rel=0.001)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("unsloth/gemma-3-1b-it", "google/gemma-3-1b-it"),
        ("x/y", ""),
    ],
)
def test_mistyped_name_has_the_nearest_known_one(name: str, near: str) -> None:
    assert catalog.nearest_name(name) == near


def test_importing_the_catalog_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from jetson_ft.models import catalog\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_model_that_does_not_generate_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="clip is a multimodal model"):
        catalog.model_dims(BaseModelFiles("x/clip", tmp_path))
