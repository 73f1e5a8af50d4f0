"""Adapters: put on, saved, and loaded for the right base only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from jetson_ft.adapter import (
    BASE_FILE,
    attach_adapter,
    base_warning,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from jetson_ft.errors import UserError
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, load_model, load_tokenizer
from jetson_ft.recipe import LoraRecipe

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def phi(tiny_phi: Path) -> BaseModelFiles:
    return BaseModelFiles("tiny", tiny_phi)


def model_of(base: BaseModelFiles) -> Any:
    return load_model(base, WeightFormat("fp32"), "cpu")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.Tensor(model(IDS).logits)


def perturbed(base: BaseModelFiles, **lora: Any) -> Any:
    """An adapter whose weights are not the starting ones."""
    model = attach_adapter(model_of(base), LoraRecipe(rank=4, **lora), seed=0).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def saved(phi: BaseModelFiles, tmp_path: Path) -> Path:
    """A saved adapter."""
    folder = tmp_path / "adapter"
    save_adapter(perturbed(phi), load_tokenizer(phi), phi, folder)
    return folder


def adapted(model: Any) -> list[str]:
    """Paths of the layers that have an adapter."""
    ending = ".lora_A.default.weight"
    names = [n.removesuffix(ending) for n, _ in model.named_parameters() if n.endswith(ending)]
    return [name.removeprefix("base_model.model.model.") for name in names]


# Put on


def test_a_fresh_adapter_changes_nothing(phi: BaseModelFiles) -> None:
    base = model_of(phi)
    before = logits(base)
    assert torch.equal(logits(attach_adapter(base, LoraRecipe(rank=4), seed=0)), before)


def test_the_seed_determines_the_first_weights(phi: BaseModelFiles) -> None:
    weights = [
        torch.cat([p.flatten() for n, p in attach_adapter(
            model_of(phi), LoraRecipe(rank=4), seed=seed).named_parameters() if "lora_A" in n])
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_all_linear_layers_but_the_head_get_an_adapter(phi: BaseModelFiles) -> None:
    layers = adapted(attach_adapter(model_of(phi), LoraRecipe(rank=4), seed=0))
    ends = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense",
            "mlp.fc1", "mlp.fc2"}  # fmt: skip
    assert sorted(layers) == sorted(f"layers.{layer}.{end}" for layer in (0, 1) for end in ends)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (["self_attn.q_proj"], ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        (["layers.1.mlp.fc1"], ["layers.1.mlp.fc1"]),
    ],
)
def test_targets_are_names_or_ends_of_paths(
    phi: BaseModelFiles, targets: str | list[str], layers: list[str]
) -> None:
    assert (
        adapted(attach_adapter(model_of(phi), LoraRecipe(rank=4, target_modules=targets), seed=0))
        == layers
    )


@pytest.mark.parametrize(
    ("targets", "what", "fix"),
    [
        (["q_porj"], "named q_porj.", "Did you mean q_proj? It has: dense, fc1, fc2, k_proj"),
        ("self_attn.q_porj", "named self_attn.q_porj.", "Did you mean q_proj?"),
        (["q_proj", "xyzzy"], "named xyzzy.", "It has: dense, fc1"),
        (["layers.7.mlp.fc1"], "named layers.7.mlp.fc1.", "Did you mean fc1?"),
        (["embed_tokens"], "named embed_tokens.", "or write all-linear."),
    ],
)
def test_unknown_targets_are_named_with_the_nearest(
    phi: BaseModelFiles, targets: str | list[str], what: str, fix: str
) -> None:
    with pytest.raises(UserError) as caught:
        attach_adapter(model_of(phi), LoraRecipe(rank=4, target_modules=targets), seed=0)
    assert str(caught.value.what).endswith(what)
    assert str(caught.value.where) == "lora.target_modules"
    assert fix in str(caught.value.fix)


def test_the_scaling_is_alpha_over_rank_or_over_its_root(phi: BaseModelFiles) -> None:
    for rslora, scale in ((False, 6 / 4), (True, 6 / 2)):
        recipe = LoraRecipe(rank=4, alpha=6, rslora=rslora)
        model = attach_adapter(model_of(phi), recipe, seed=0)
        layer = model.base_model.model.model.layers[0].mlp.fc1
        assert layer.scaling["default"] == pytest.approx(scale)


def test_dora_trains_magnitudes_too(phi: BaseModelFiles) -> None:
    model = attach_adapter(model_of(phi), LoraRecipe(rank=4, dora=True), seed=0)
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


# Saved and loaded


@pytest.mark.parametrize(
    "kind", [{}, {"dora": True}, {"rslora": True}, {"target_modules": ["fc1"]}]
)
def test_a_saved_adapter_loads_with_plain_peft(
    phi: BaseModelFiles, tmp_path: Path, kind: dict[str, Any]
) -> None:
    model = perturbed(phi, **kind)
    save_adapter(model, load_tokenizer(phi), phi, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(phi.folder), tmp_path)
    assert torch.equal(logits(plain.eval()), logits(model))
    assert not torch.allclose(logits(model), logits(model_of(phi)), atol=1e-3)


def test_a_saved_folder_has_tokenizer_template_and_base(phi: BaseModelFiles, saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == load_tokenizer(phi).chat_template
    assert json.loads((saved / BASE_FILE).read_text()) == {
        "name": phi.name, "folder": str(phi.folder), "fingerprint": phi.fingerprint()
    }  # fmt: skip
    assert not list(saved.glob("*.bin"))


def test_a_loaded_adapter_equals_the_saved_one_in_evaluation_mode(
    phi: BaseModelFiles, saved: Path
) -> None:
    loaded = load_adapter(model_of(phi), phi, saved)
    assert torch.equal(logits(loaded), logits(perturbed(phi)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_same_base_in_another_folder_is_accepted(
    phi: BaseModelFiles, saved: Path, tmp_path: Path
) -> None:
    moved = BaseModelFiles("elsewhere", Path(shutil.copytree(phi.folder, tmp_path / "moved")))
    assert torch.equal(logits(load_adapter(model_of(moved), moved, saved)), logits(perturbed(phi)))


def other_base(phi: BaseModelFiles, tmp_path: Path) -> BaseModelFiles:
    """The same architecture with other weights."""
    model = model_of(phi)
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    return BaseModelFiles("other", tmp_path / "other")


def test_another_base_is_refused_with_both_names(
    phi: BaseModelFiles, saved: Path, tmp_path: Path
) -> None:
    other = other_base(phi, tmp_path)
    with pytest.raises(UserError) as caught:
        load_adapter(model_of(other), other, saved)
    own, others = phi.fingerprint()[:12], other.fingerprint()[:12]
    assert f"another base: tiny ({own}), not other ({others})" in str(caught.value.what)
    assert str(caught.value.fix) == "Load it with `--model tiny`."


def test_a_foreign_adapter_for_another_base_name_loads_with_a_warning(
    phi: BaseModelFiles, saved: Path
) -> None:
    assert base_warning(phi, saved) is None, "it has a fingerprint"
    (saved / BASE_FILE).unlink()
    assert base_warning(phi, saved) is None, "it names the folder"
    set_config(base_model_name_or_path="somebody/else")(saved)
    load_adapter(model_of(phi), phi, saved)
    assert "made for somebody/else. Whether tiny" in str(base_warning(phi, saved))


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are refused") as caught:
        read_adapter_config(saved)
    assert str(caught.value.where) == str(saved)


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # nothing in it is read
    with pytest.raises(UserError, match="No adapter found") as caught:
        read_adapter_config(tmp_path)
    assert str(caught.value.where) == str(tmp_path)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "deserializing header"),
        (set_config(r=8), "size mismatch"),
        (set_config(target_modules=["nope"]), "nope"),
        (set_config(peft_type="NEW"), "NEW"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    phi: BaseModelFiles, saved: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(saved)
    with pytest.raises(UserError, match=f"doesn't fit the model tiny, or is damaged: .*{message}"):
        load_adapter(model_of(phi), phi, saved)


@pytest.mark.parametrize(
    ("settings", "with_embedding"),
    [
        ({}, True),
        ({"trainable_token_indices": [258, 259]}, True),
        ({"trainable_token_indices": [258, 259]}, False),
        ({"trainable_token_indices": {"embed_tokens": [259]}}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
)
def test_an_adapter_for_more_tokens_than_the_model_has_is_refused(
    phi: BaseModelFiles, tmp_path: Path, settings: dict[str, Any], with_embedding: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(phi.folder)
    base.resize_token_embeddings(260)
    model = get_peft_model(base, LoraConfig(r=2, **({"target_modules": ["q_proj"]} | settings)))
    model.save_pretrained(tmp_path, save_embedding_layers=with_embedding)
    with pytest.raises(UserError, match=r"weights for 260 tokens, but tiny has only 259") as caught:
        load_adapter(model_of(phi), phi, tmp_path)
    assert str(caught.value.where) == str(tmp_path)
    assert "enlarged the vocabulary" in str(caught.value.fix)


def gradients(model: Any) -> torch.Tensor:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_evaluation_before_training_does_not_change_gradients(
    wide_phi: Path, quantize: str
) -> None:
    base = BaseModelFiles("wide", wide_phi)
    fresh, measured = (
        attach_adapter(load_model(base, WeightFormat("bf16", quantize), "cpu"), LoraRecipe(), 0)
        for _ in range(2)
    )
    measured.eval()
    with torch.inference_mode():
        measured(input_ids=IDS)
    assert torch.equal(gradients(measured), gradients(fresh))
