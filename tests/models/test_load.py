"""Weights in five formats and what they weigh; tokenizers; files that must not be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from jetson_ft.errors import UserError
from jetson_ft.models.adapter import attach
from jetson_ft.models.load import (
    PLAIN_TEMPLATE,
    Weights,
    bytes_per_part,
    load_model,
    load_tokenizer,
)
from jetson_ft.models.loss import token_losses
from jetson_ft.models.packing import pack
from jetson_ft.models.resolve import Base, resolve
from jetson_ft.recipe import LoraRecipe

FP32 = Weights("fp32")
FORMATS = [
    FP32, Weights("bf16"), Weights("fp16"),
    Weights("fp32", "int8"), Weights("bf16", "int8"),
    Weights("fp32", "nf4"), Weights("bf16", "nf4"), Weights("bf16", "nf4", double_quantize=False),
]  # fmt: skip


@pytest.fixture
def copy(tiny_phi: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Phi to be spoilt."""
    return Path(shutil.copytree(tiny_phi, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Formats

EMBEDDING, HEAD = 259 * 64, 259 * 64 + 259
LINEAR, BIASES, LAYERS = 2 * (4 * 64 * 64 + 2 * 64 * 128), 2 * (4 * 64 + 128 + 64), 2 * 6
NORMS = 3 * 2 * 64


@pytest.mark.parametrize("weights", FORMATS[:3], ids=str)
def test_unquantised_weights_have_the_size_of_their_type(wide_phi: Path, weights: Weights) -> None:
    model = load_model(Base("x", wide_phi), weights, "cpu")
    size = 4 if weights.precision == "fp32" else 2
    assert {p.dtype for p in model.parameters()} == {weights.dtype()}
    assert bytes_per_part(model) == {
        "embedding": size * EMBEDDING,
        "head": size * HEAD,
        "linear": size * (LINEAR + BIASES),
        "adapter": 0,
        "other": size * NORMS,
    }


@pytest.mark.parametrize("weights", FORMATS[3:], ids=lambda w: f"{w}-{w.double_quantize}")
def test_quantised_layers_have_their_weights_and_scales_counted(
    wide_phi: Path, weights: Weights
) -> None:
    size = 4 if weights.precision == "fp32" else 2
    if weights.quantize == "int8":
        linear = LINEAR + 4 * BIASES  # a scale for each output
    elif weights.double_quantize:
        linear = LINEAR // 2 + LINEAR // 64 + 4 * LAYERS  # a byte a block, and their own scales
    else:
        linear = LINEAR // 2 + 4 * LINEAR // 64
    model = load_model(Base("x", wide_phi), weights, "cpu")
    found = bytes_per_part(model)
    assert found["linear"] == linear + size * BIASES
    assert (found["embedding"], found["head"]) == (size * EMBEDDING, size * HEAD)
    if weights.quantize == "nf4":
        assert model.model.layers[0].mlp.fc1.weight.quant_type == "nf4"


def test_a_tied_head_is_counted_once(tiny_llama: Path) -> None:
    found = bytes_per_part(load_model(Base("x", tiny_llama), FP32, "cpu"))
    assert (found["embedding"], found["head"]) == (4 * 259 * 48, 0)


def test_the_last_positions_of_a_batch_reach_the_head_side_by_side(tiny_llama: Path) -> None:
    model = load_model(Base("x", tiny_llama), FP32, "cpu")
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, found: seen.append(*found))
    with torch.inference_mode():
        model(torch.ones(3, 5, dtype=torch.long), logits_to_keep=1)
    assert seen[0].shape == (3, 1, 48) and seen[0].is_contiguous()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # plans for each new length, on a GPU


@pytest.mark.parametrize("weights", FORMATS, ids=lambda w: f"{w}-{w.double_quantize}")
def test_an_adapter_learns_on_every_format(wide_phi: Path, weights: Weights) -> None:
    base = load_model(Base("x", wide_phi), weights, "cpu")
    assert not base.training and not any(p.requires_grad for p in base.parameters())
    model = attach(base, LoraRecipe(rank=2), seed=0)
    rows = [{"input_ids": [5, 6, 7, 8], "parts": [0, 1, 1, 2]}]
    token_losses(model, pack(rows)).sum().backward()
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(learnt) == 2 * LAYERS and all("lora_" in name for name in learnt)
    assert {p.dtype for p in learnt.values()} == {torch.float32}
    for name, parameter in learnt.items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        if "lora_B" in name and "k_proj" not in name:
            assert float(parameter.grad.abs().max()) > 0, name
    assert bytes_per_part(model)["adapter"] == 4 * sum(p.numel() for p in learnt.values())


def test_quantised_weights_still_say_what_the_model_says(wide_phi: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = {
        str(weights): load_model(Base("x", wide_phi), weights, "cpu")(ids).logits.float()
        for weights in (FP32, Weights("fp32", "int8"), Weights("fp32", "nf4"))
    }
    spread = float(logits["fp32"].std())
    assert 0 < float((logits["int8/fp32"] - logits["fp32"]).std()) < 0.02 * spread
    assert 0 < float((logits["nf4/fp32"] - logits["fp32"]).std()) < 0.2 * spread


def test_a_gguf_file_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    base = Base("x", tmp_path, write_gguf(tmp_path / "tiny.gguf").name)
    tokenizer, model = load_tokenizer(base), load_model(base, FP32, "cpu")
    assert tokenizer.decode(tokenizer("你好")["input_ids"]) == "你好"
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.get_input_embeddings().weight.shape == (260, 32)
    assert float(model(torch.tensor([[3, 4]])).logits.std()) > 0.1


def test_a_gguf_file_is_not_quantised_again(tmp_path: Path) -> None:
    base = Base("x", tmp_path, write_gguf(tmp_path / "tiny.gguf").name)
    with pytest.raises(UserError, match="can't be loaded as nf4") as caught:
        load_model(base, Weights("fp32", "nf4"), "cpu")
    assert "quantize: none" in caught.value.fix


def test_a_model_without_sdpa_loads_too(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(Base("x", tmp_path), FP32, "cpu").config.model_type == "bloom"


# Files that are damaged, or must not be loaded


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_shapes(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=96)


def foreign_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="clip", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("open('hacked', 'w'); Model = 1")


def pickle_only(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def no_architecture(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_weights, "weights are damaged or cut off"),
        (without_head, "1 of the model's tensors are missing .* lm_head.weight is one"),
        (other_shapes, "6 of the model's tensors .* of another shape .*fc1.bias is one"),
        (foreign_code, "contains custom code"),
        (pickle_only, "no file named model.safetensors"),
        (no_architecture, "Should have a `model_type` key"),
    ],
)
def test_such_a_folder_is_refused_in_one_line(
    copy: Path, spoil: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(copy)
    monkeypatch.chdir(copy.parent)
    with pytest.raises(UserError, match=message) as caught:
        load_model(Base("x", copy), FP32, "cpu")
    assert "\n" not in caught.value.what
    assert caught.value.where == str(copy)
    assert not (copy.parent / "hacked").exists()


def test_nobody_is_asked_whether_foreign_code_may_run(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    foreign_code(copy)
    with pytest.raises(UserError, match="contains custom code"):
        load_model(Base("x", copy), FP32, "cpu")


# Tokenizers


def test_a_base_model_gets_the_plain_template_and_a_pad_token(tiny_phi: Path) -> None:
    tokenizer = load_tokenizer(Base("x", tiny_phi))
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_chat_model_keeps_its_template(tiny_llama: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert load_tokenizer(Base("x", tiny_llama)).chat_template == own


def test_texts_open_with_the_start_token_where_the_model_knows_them_so(copy: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(Base("x", copy)).chat_template == PLAIN_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(copy)
    found = load_tokenizer(Base("x", copy))
    text = found.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert text == "<|im_start|>Human:\nQ\n\n"


def test_a_tokenizer_without_end_token_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(Base("x", copy))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": "9"}'])
def test_a_missing_or_damaged_tokenizer_is_refused(copy: Path, content: str | None) -> None:
    file = copy / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match="tokenizer can't be loaded") as caught:
        load_tokenizer(Base("x", copy))
    assert caught.value.where == str(copy) and "tokenizer.json" in caught.value.fix


def test_a_tokenizer_never_brings_its_own_code(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(
        copy / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    (copy / "evil.py").write_text("open('hacked', 'w'); Evil = 1")
    assert load_tokenizer(resolve(str(copy))).eos_token == "<|endoftext|>"
    assert not (tmp_path / "hacked").exists()
