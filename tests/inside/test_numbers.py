"""A model's numbers: parts add up, and agree with what torch and bitsandbytes hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_architectures import tiny_config, tiny_model

from jetson_ft.hardware.boards import find_board
from jetson_ft.inside import numbers
from jetson_ft.inside.numbers import compute_numbers, model_parts
from jetson_ft.models import catalog
from jetson_ft.models.dims import dims_from_config
from jetson_ft.recipe import Recipe
from jetson_ft.training import cost_model

DEVICE = find_board("orin-nx-16gb").device()


@pytest.mark.parametrize("name", catalog.MODELS)
def test_parts_add_up_to_the_model(name: str) -> None:
    dims = catalog.MODELS[name].dims
    parts = model_parts(dims)
    assert sum(part.parameters for part in parts) == dims.parameters
    for label, weights in numbers.FORMATS.items():
        total = sum(part.bytes[label] for part in parts)
        assert total == pytest.approx(cost_model.weight_bytes(dims, weights), abs=4)


@pytest.mark.parametrize("kind", ["llama", "phi", "qwen2", "gpt2"])
def test_parts_are_those_of_the_modules(kind: str) -> None:
    model = tiny_model(kind)
    counted: Counter[str] = Counter()
    for path, parameter in model.named_parameters():
        module = model.get_submodule(path.rpartition(".")[0])
        if module is model.get_input_embeddings():
            name = "embedding"
        elif path.endswith(".bias"):
            name = "other"  # but for a norm's, which `dims` can't tell from others: the same
        elif "norm" in path or "ln_" in path:
            name = "norms"
        elif module is model.get_output_embeddings():
            name = "head"
        else:
            name = "attention" if "attn" in path else "mlp" if "mlp" in path else "other"
        counted[name] += parameter.numel()
    parts = model_parts(dims_from_config(tiny_config(kind)))
    assert {part.name: part.parameters for part in parts} == counted


def test_full_training_takes_16_bytes_a_parameter_and_shards_divide_them() -> None:
    shown = compute_numbers(Recipe(), DEVICE)
    full = {(each.boards, each.sharded): each for each in shown.boards if each.method == "full"}
    alone = full[1, False]
    assert alone.weights + alone.gradients + alone.optimizer == 16 * shown.parameters
    assert full[8, False] == numbers.replace(alone, boards=8)
    assert full[8, True].optimizer == pytest.approx(alone.optimizer / 8, rel=1e-6)
    assert alone.total > full[2, True].total > full[4, True].total > full[8, True].total


def test_memory_of_lora_is_that_of_the_plan() -> None:
    shown = compute_numbers(Recipe(), DEVICE)
    full, lora, qlora = shown.training
    assert [each.method for each in shown.training] == ["full", "lora", "qlora"]
    assert qlora.total < lora.total < full.total
    dims = catalog.MODELS["embedded"].dims
    frozen = cost_model.weight_bytes(dims, numbers.FORMATS["bf16"])
    assert lora.weights == frozen + 6 * shown.adapter_parameters
    assert lora.gradients + lora.optimizer == 12 * shown.adapter_parameters


def test_numbers_of_a_folder_need_no_weights(tiny_phi: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_phi / "config.json").read_bytes())
    shown = compute_numbers(Recipe(model=str(tmp_path)), DEVICE).to_json()
    assert shown["layers"] == 2 and shown["parameters"] == sum(
        part["parameters"] for part in shown["parts"]
    )
    assert shown["training"][0]["total"] > 0
