"""Many architectures, tiny and with random weights: counted as they are, trained, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from jetson_ft.adapter import attach_adapter, check_target_modules
from jetson_ft.errors import UserError
from jetson_ft.kernels.lm_head_loss import token_losses
from jetson_ft.kernels.packing import pack_rows
from jetson_ft.models import catalog, loading
from jetson_ft.models.dims import dims_from_config
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.layers import quantized_layers
from jetson_ft.recipe import LoraRecipe
from jetson_ft.training import cost_model

# Small values for what configs of many architectures call their dimensions.
SIZES = dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 259)
SIZES |= dict.fromkeys(["hidden_size", "d_model", "n_embd", "attention_hidden_size"], 64)
SIZES |= dict.fromkeys(
    ["intermediate_size", "ffn_dim", "n_inner", "shared_expert_intermediate_size"], 128
)
SIZES |= dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4)
SIZES |= dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2)
SIZES |= dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4)
SIZES |= dict.fromkeys(["moe_intermediate_size", "mamba_d_head", "global_head_dim"], 32)
SIZES |= dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 256)
SIZES |= dict.fromkeys(["q_lora_rank", "kv_lora_rank", "v_head_dim", "mamba_d_state"], 16)
SIZES |= dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim"], 8)
SIZES |= {
    "head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "mamba_n_heads": 4, "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "state_size": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
    "num_channels": 3, "image_size": 28, "patch_size": 14,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEEDED = {"num_key_value_heads", "num_experts_per_tok"}  # where the default is None too
MLA = {"head_dim": 8}  # DeepSeek's is that of the rotated part
HYBRID = {"num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip

EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"]
DENSE = [
    "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "opt",
    "gpt2", "gpt_neox", "gpt_bigcode", "bloom", "falcon", "mpt", "smollm3", "starcoder2",
    "stablelm", "granite", "olmo2", "cohere", "glm4", "exaone4", "nemotron", "helium", "lfm2",
    "modernbert-decoder", "gemma3n_text", "gemma4_text", "qwen3_5_text",
]  # fmt: skip
MIXED = ["gemma3", "gemma4", "fuyu", "llama4_text", "phimoe", "falcon_h1", "mamba", "rwkv"]
TRAINED = [*DENSE, *EXPERTS, *MIXED]
REFUSED = {
    "t5": "t5 is an encoder-decoder",
    "bart": "bart is an encoder-decoder",
    "whisper": "whisper is an encoder-decoder",
    "bert": "bert is no causal language model",
    "xlnet": "xlnet is no causal language model",
    "vit": "vit is no causal language model",
    "qwen2_vl": "qwen2_vl is a multimodal model",
    "mistral3": "mistral3 is a multimodal model",
    "xlstm": "xlstm can't compute single logits",
}


def tiny_config(model_type: str) -> Any:
    """Return a config of small dimensions; its defaults stay where the architecture has none."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip("this version of transformers doesn't have it")
    sizes = SIZES | (MLA if "deepseek" in model_type else {})
    sizes |= HYBRID if model_type.startswith("qwen3_5") else {}
    defaults = AutoConfig.for_model(model_type).to_dict()

    def shrink(values: dict[str, Any]) -> dict[str, Any]:
        names = [k for k, v in values.items() if k.endswith("_config") and isinstance(v, dict)]
        shrunk = {name: shrink(values[name]) for name in names if name != "per_layer_config"}
        numbers = {
            name: size
            for name, size in sizes.items()
            if values.get(name) is not None or (name in NEEDED and name in values)
        }
        kept = {"model_type": values["model_type"]} if "model_type" in values else {}
        return kept | numbers | shrunk

    changes = shrink(defaults)
    return AutoConfig.for_model(changes.pop("model_type"), **changes)


def tiny_model(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).requires_grad_(False)


def with_adapter(model: Any, **lora: Any) -> Any:
    return attach_adapter(model, LoraRecipe(rank=4, **lora), seed=0)


@pytest.mark.parametrize("model_type", TRAINED)
def test_counts_are_those_of_the_model_and_of_peft(model_type: str) -> None:
    dims = dims_from_config(tiny_config(model_type))
    model = tiny_model(model_type)
    assert dims.parameters == sum(parameter.numel() for parameter in model.parameters())
    names = quantized_layers(model)
    quantized = sum(model.get_submodule(name).weight.numel() for name in names)
    assert dims.quantized_parameters == quantized
    trained = with_adapter(model).get_nb_trainable_parameters()[0]
    assert trained == dims.lora_parameters(4) > 0


@pytest.mark.parametrize("model_type", TRAINED)
def test_every_adapter_gets_a_gradient(model_type: str) -> None:
    model = with_adapter(tiny_model(model_type)).train()
    rows = [{"input_ids": list(range(5, 25)), "segments": [0] + [1] * 18 + [2]}]
    token_losses(model, pack_rows(rows)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_counted_as_frozen_and_unquantized(model_type: str) -> None:
    config = tiny_config(model_type)
    dims = dims_from_config(config)
    experts = [
        parameter.numel()
        for name, parameter in tiny_model(model_type).named_parameters()
        if "experts" in name and parameter.ndim == 3
    ]
    assert dims.expert_parameters == sum(experts) > 0
    assert dims.experts_used == 0.5  # two of four
    coverage = dims.coverage(4, "all-linear", "nf4")
    share = sum(experts) / dims.parameters
    assert coverage.quantized_share < 1 - share
    assert f"The experts, {share:.0%} of the parameters, get no adapter" in str(coverage.notes[0])
    assert "not quantized" in str(coverage.notes[0])
    nf4 = cost_model.weight_bytes(dims, loading.WeightFormat("bf16", "nf4"))
    assert nf4 > 2 * (sum(experts) + dims.embedding_parameters)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "gemma3", "gpt2"])
def test_a_saved_adapter_loads_with_plain_peft(model_type: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_adapter(tiny_model(model_type)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_model(model_type), tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_layers_for_images_get_no_adapter() -> None:
    config = tiny_config("gemma3")
    coverage = dims_from_config(config).coverage(4, ["q_proj"])
    assert "rows are text" in str(coverage.notes[0])
    model = with_adapter(tiny_model("gemma3"), target_modules=["q_proj"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".language_model." in name for name in trained)


def test_layers_that_bitsandbytes_passes_over_are_counted_whole() -> None:
    dims = dims_from_config(tiny_config("falcon"))
    coverage = dims.coverage(4, "all-linear", "nf4")
    assert coverage.quantized_share == 0 and coverage.adapted_share > 0.5
    assert "bitsandbytes does not quantize" in str(coverage.notes[0])
    formats = [loading.WeightFormat("bf16", quantize) for quantize in ("none", "int8", "nf4")]
    sizes = [cost_model.weight_bytes(dims, weights) for weights in formats]
    assert sizes == [2 * dims.parameters] * 3


def test_conv1d_layers_get_an_adapter_by_name() -> None:
    dims = dims_from_config(tiny_config("gpt2"))
    model = with_adapter(tiny_model("gpt2"), target_modules=["c_attn"])
    trained = model.get_nb_trainable_parameters()[0]
    assert trained == dims.lora_parameters(4, ["c_attn"]) == 2 * 4 * (64 + 3 * 64)
    assert model.peft_config["default"].fan_in_fan_out


def test_a_model_of_different_widths_is_counted_by_their_mean() -> None:
    config = tiny_config("gemma4_text")
    widths = [layer.head_dim for layer in config.per_layer_config]
    assert len(set(widths)) > 1
    assert dims_from_config(config).head_dim == -(-sum(widths) // len(widths))


def test_an_embedding_narrower_than_the_hidden_state_is_counted() -> None:
    config = tiny_config("opt")
    config.word_embed_proj_dim = 32  # as OPT-350m
    dims = dims_from_config(config)
    assert dims.embedding_parameters == 259 * 32
    model = AutoModelForCausalLM.from_config(config)
    assert dims.parameters == sum(parameter.numel() for parameter in model.parameters())


# Refused


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_architecture_that_cannot_be_trained_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(UserError, match=REFUSED[model_type]) as caught:
        dims_from_config(tiny_config(model_type))
    assert "\n" not in str(caught.value.what) and str(caught.value.fix)


@pytest.mark.parametrize("model_type", CONFIG_MAPPING_NAMES)
def test_any_config_is_counted_or_refused(model_type: str) -> None:
    try:
        config = AutoConfig.for_model(model_type)
    except Exception:  # some have no defaults
        pytest.skip("no default config")
    try:
        assert dims_from_config(config).parameters > 0
    except UserError as error:
        assert "\n" not in str(error.what)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantized_checkpoints_are_refused(method: str, tmp_path: Path) -> None:
    config = tiny_config("llama").to_dict() | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"quantized already \({method}\)") as caught:
        catalog.model_dims(BaseModelFiles("x", tmp_path))
    assert str(caught.value.where) == str(tmp_path) and "unquantized" in str(caught.value.fix)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "nothing"},
        {"rope_parameters": 5}, {"num_key_value_heads": -1}, {"vocab_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_config_is_a_user_error(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config("llama").to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        catalog.model_dims(BaseModelFiles("x", tmp_path))
    assert "\n" not in str(caught.value.what) and str(caught.value.where) == str(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"model_type": 5}', '{"model_type": "t"}'])
def test_a_config_without_architecture_is_a_user_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        catalog.model_dims(BaseModelFiles("x", tmp_path))


def test_an_architecture_newer_than_transformers_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama9"}')
    with pytest.raises(UserError, match='has no architecture "llama9"') as caught:
        catalog.model_dims(BaseModelFiles("x", tmp_path))
    assert "pip install -U transformers" in str(caught.value.fix)


# Target modules, without weights


@pytest.mark.parametrize("targets", ["all-linear", "c_attn", ["c_attn", "h.1.mlp.c_fc"]])
def test_targets_of_the_model_pass(targets: Any) -> None:
    check_target_modules(dims_from_config(tiny_config("gpt2")), targets)


@pytest.mark.parametrize("targets", ["q_proj", ["c_attn", "lm_head"], ["h.1"], ["h.2.mlp.c_fc"]])
def test_other_targets_are_refused_with_the_models_names(targets: Any) -> None:
    with pytest.raises(UserError, match="has no linear layer named") as caught:
        check_target_modules(dims_from_config(tiny_config("gpt2")), targets)
    assert "c_attn, c_fc, c_proj" in str(caught.value.fix)
    assert str(caught.value.where) == "lora.target_modules"
