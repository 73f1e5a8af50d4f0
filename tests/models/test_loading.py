"""Weights in five formats and what they weigh; tokenizers; files that must not be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, Gemma2Config, PhiConfig

from jetson_ft.adapter import attach_adapter
from jetson_ft.data.chat_template import encode
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.errors import UserError
from jetson_ft.kernels.lm_head_loss import token_losses
from jetson_ft.kernels.packing import pack_rows
from jetson_ft.models.files import BaseModelFiles, resolve_model
from jetson_ft.models.loading import (
    WeightFormat,
    _repair_quantized_layers,
    bytes_per_part,
    check_vocabulary,
    load_model,
    load_tokenizer,
)
from jetson_ft.recipe import LoraRecipe

FP32 = WeightFormat("fp32")
FORMATS = [
    FP32, WeightFormat("bf16"), WeightFormat("fp16"),
    WeightFormat("fp32", "int8"), WeightFormat("bf16", "int8"),
    WeightFormat("fp32", "nf4"), WeightFormat("bf16", "nf4"),
    WeightFormat("bf16", "nf4", double_quantize=False),
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
def test_unquantized_weights_have_the_size_of_their_type(
    wide_phi: Path, weights: WeightFormat
) -> None:
    model = load_model(BaseModelFiles("x", wide_phi), weights, "cpu")
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
def test_bytes_of_quantized_layers_include_their_scales(
    wide_phi: Path, weights: WeightFormat
) -> None:
    size = 4 if weights.precision == "fp32" else 2
    if weights.quantize == "int8":
        linear = LINEAR + 4 * BIASES  # a scale for each output
    elif weights.double_quantize:
        linear = LINEAR // 2 + LINEAR // 64 + 4 * LAYERS  # a byte a block, and their own scales
    else:
        linear = LINEAR // 2 + 4 * LINEAR // 64
    model = load_model(BaseModelFiles("x", wide_phi), weights, "cpu")
    parts = bytes_per_part(model)
    assert parts["linear"] == linear + size * BIASES
    assert (parts["embedding"], parts["head"]) == (size * EMBEDDING, size * HEAD)
    if weights.quantize == "nf4":
        assert model.model.layers[0].mlp.fc1.weight.quant_type == "nf4"


def test_a_tied_head_is_counted_once(tiny_llama: Path) -> None:
    parts = bytes_per_part(load_model(BaseModelFiles("x", tiny_llama), FP32, "cpu"))
    assert (parts["embedding"], parts["head"]) == (4 * 259 * 48, 0)


def test_the_heads_input_is_contiguous(tiny_llama: Path) -> None:
    model = load_model(BaseModelFiles("x", tiny_llama), FP32, "cpu")
    inputs: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(*args))
    with torch.inference_mode():
        model(torch.ones(3, 5, dtype=torch.long), logits_to_keep=1)
    assert inputs[0].shape == (3, 1, 48) and inputs[0].is_contiguous()
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # plans for each new length, on a GPU


@pytest.mark.parametrize("weights", FORMATS, ids=lambda w: f"{w}-{w.double_quantize}")
def test_an_adapter_trains_on_every_format(wide_phi: Path, weights: WeightFormat) -> None:
    base = load_model(BaseModelFiles("x", wide_phi), weights, "cpu")
    assert not base.training and not any(p.requires_grad for p in base.parameters())
    model = attach_adapter(base, LoraRecipe(rank=2), seed=0)
    rows = [{"input_ids": [5, 6, 7, 8], "segments": [0, 1, 1, 2]}]
    token_losses(model, pack_rows(rows)).sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * LAYERS and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for name, parameter in trained.items():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        if "lora_B" in name and "k_proj" not in name:
            assert float(parameter.grad.abs().max()) > 0, name
    assert bytes_per_part(model)["adapter"] == 4 * sum(p.numel() for p in trained.values())


def test_quantized_weights_give_nearly_the_same_logits(wide_phi: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = {
        str(weights): load_model(BaseModelFiles("x", wide_phi), weights, "cpu")(ids).logits.float()
        for weights in (FP32, WeightFormat("fp32", "int8"), WeightFormat("fp32", "nf4"))
    }
    spread = float(logits["fp32"].std())
    assert 0 < float((logits["int8/fp32"] - logits["fp32"]).std()) < 0.02 * spread
    assert 0 < float((logits["nf4/fp32"] - logits["fp32"]).std()) < 0.2 * spread


@pytest.mark.parametrize(("inputs", "inside"), [(48, 80), (64, 80), (96, 128)])
def test_nf4_layers_of_any_shape_evaluate(inputs: int, inside: int, tmp_path: Path) -> None:
    """Before its first reply on a CPU with AVX512-BF16, bitsandbytes packs 32 outputs together."""
    config = PhiConfig(
        vocab_size=259, hidden_size=inputs, intermediate_size=inside, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base, ids = BaseModelFiles("x", tmp_path), torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        plain, nf4 = (
            load_model(base, WeightFormat("fp32", quantize), "cpu")(input_ids=ids).logits
            for quantize in ("none", "nf4")
        )
    assert 0 < float((nf4 - plain).std()) < 0.5 * float(plain.std())


def test_layers_that_cannot_be_packed_are_excluded_from_it(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = torch.nn.ModuleList(Linear4bit(*size) for size in ((64, 32), (64, 48), (96, 32)))
    for layer in model:
        layer.weight.quant_state = SimpleNamespace(blocksize=64)
        layer.support_avx512bf16_for_cpu = True
    _repair_quantized_layers(model)
    assert [layer.support_avx512bf16_for_cpu for layer in model] == [True, False, False]


def test_int8_layers_take_inputs_of_four_dimensions(wide_phi: Path) -> None:
    """As in DeepSeek's attention."""
    model = load_model(BaseModelFiles("x", wide_phi), WeightFormat("fp32", "int8"), "cpu")
    layer, x = model.model.layers[0].mlp.fc1, torch.randn(2, 1, 5, 64)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x[:, 0])[:, None])


def test_a_gguf_file_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    base = BaseModelFiles("x", tmp_path, write_gguf(tmp_path / "tiny.gguf").name)
    tokenizer, model = load_tokenizer(base), load_model(base, FP32, "cpu")
    assert tokenizer.decode(tokenizer("你好")["input_ids"]) == "你好"
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.get_input_embeddings().weight.shape == (260, 32)
    assert float(model(torch.tensor([[3, 4]])).logits.std()) > 0.1


def test_a_gguf_file_is_not_quantized_again(tmp_path: Path) -> None:
    base = BaseModelFiles("x", tmp_path, write_gguf(tmp_path / "tiny.gguf").name)
    with pytest.raises(UserError, match="can't be loaded as nf4") as caught:
        load_model(base, WeightFormat("fp32", "nf4"), "cpu")
    assert "quantize: none" in str(caught.value.fix)


def test_a_model_without_sdpa_loads_too(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(BaseModelFiles("x", tmp_path), FP32, "cpu").config.model_type == "bloom"


# Files that are damaged, or must not be loaded


def test_a_model_with_soft_capped_scores_has_eager_attention(tmp_path: Path) -> None:
    """transformers 5.20 would load it with another one, which has no cap."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path)), WeightFormat("fp32"), "cpu")
    assert model.config._attn_implementation == "eager"


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
        (other_shapes, "6 of the model's tensors .* another shape .*fc1.bias is one"),
        (foreign_code, "contains custom code"),
        (pickle_only, "no file named model.safetensors"),
        (no_architecture, "Should have a `model_type` key"),
    ],
)
def test_an_unusable_folder_is_refused_in_one_line(
    copy: Path, spoil: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(copy)
    monkeypatch.chdir(copy.parent)
    with pytest.raises(UserError, match=message) as caught:
        load_model(BaseModelFiles("x", copy), FP32, "cpu")
    assert "\n" not in str(caught.value.what)
    assert str(caught.value.where) == str(copy)
    assert not (copy.parent / "hacked").exists()


def test_foreign_code_is_refused_without_a_question(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    foreign_code(copy)
    with pytest.raises(UserError, match="contains custom code"):
        load_model(BaseModelFiles("x", copy), FP32, "cpu")


# Tokenizers


def test_a_base_model_gets_the_plain_template_and_a_pad_token(tiny_phi: Path) -> None:
    tokenizer = load_tokenizer(BaseModelFiles("x", tiny_phi))
    assert tokenizer.chat_template == TEMPLATES["plain"]
    assert tokenizer.pad_token == "<|endoftext|>"


def test_a_chat_model_keeps_its_template(tiny_llama: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert load_tokenizer(BaseModelFiles("x", tiny_llama)).chat_template == own


@pytest.mark.parametrize(
    "template", [5, True, [{"name": "default", "template": 5}], [{"name": "a", "template": None}]]
)
def test_a_chat_template_that_is_not_text_is_refused(copy: Path, template: Any) -> None:
    edit(copy / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UserError, match="chat template is not text") as caught:
        load_tokenizer(BaseModelFiles("x", copy))
    assert str(caught.value.where) == str(copy)


def test_several_chat_templates_without_a_default_are_reported_when_one_is_needed(
    copy: Path,
) -> None:
    templates = [{"name": name, "template": "{{ messages }}"} for name in ("a", "tool_use")]
    edit(copy / "tokenizer_config.json", chat_template=templates)
    tokenizer = load_tokenizer(BaseModelFiles("x", copy))
    rows = [ChatMessage(role="user", content="q"), ChatMessage(role="assistant", content="a")]
    with pytest.raises(UserError, match="multiple chat templates"):
        encode(tokenizer, rows)


def test_the_plain_template_starts_with_the_start_token_of_the_tokenizer(copy: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(BaseModelFiles("x", copy)).chat_template == TEMPLATES["plain"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(copy)
    tokenizer = load_tokenizer(BaseModelFiles("x", copy))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}], tokenize=False)
    assert text == "<|im_start|>Human:\nQ\n\n"


def test_a_tokenizer_without_end_token_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(BaseModelFiles("x", copy))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": "9"}'])
def test_a_missing_or_damaged_tokenizer_is_refused(copy: Path, content: str | None) -> None:
    file = copy / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match="tokenizer can't be loaded") as caught:
        load_tokenizer(BaseModelFiles("x", copy))
    assert str(caught.value.where) == str(copy) and "tokenizer.json" in str(caught.value.fix)


def test_a_tokenizers_own_code_is_never_run(
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
    assert load_tokenizer(resolve_model(str(copy))).eos_token == "<|endoftext|>"
    assert not (tmp_path / "hacked").exists()


def test_a_tokenizer_of_sentencepiece_alone_loads(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {number} red foxes saw a dog" for number in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2
    )
    for name in ("text.txt", "tokenizer.vocab"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"})
    )
    tokenizer = load_tokenizer(BaseModelFiles("x", tmp_path))
    assert tokenizer.decode(tokenizer("red foxes")["input_ids"], skip_special_tokens=True).strip()


def test_more_tokens_than_embedding_rows_are_refused(tiny_phi: Path) -> None:
    base = BaseModelFiles("x", tiny_phi)
    tokenizer = load_tokenizer(base)
    assert len(tokenizer) == 259
    check_vocabulary(tokenizer, 259, base)
    with pytest.raises(UserError, match=r"has 259 tokens, but .* only 200 rows") as caught:
        check_vocabulary(tokenizer, 200, base)
    assert str(caught.value.where) == str(tiny_phi)


def test_an_added_token_without_a_row_is_refused_where_a_text_needs_it(tiny_llama: Path) -> None:
    base = BaseModelFiles("x", tiny_llama)
    tokenizer = load_tokenizer(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) > 259
    check_vocabulary(tokenizer, 259, base)
    with pytest.raises(UserError, match="has 260 tokens"):
        check_vocabulary(tokenizer, 259, base, texts=[[1], [3, 259]])
    tokenizer.chat_template = "<image>" + str(tokenizer.chat_template)
    with pytest.raises(UserError, match="has 260 tokens"):
        check_vocabulary(tokenizer, 259, base)
