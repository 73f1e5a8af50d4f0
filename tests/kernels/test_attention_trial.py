"""The trial of packing: rows that affect each other are found in every number format."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
import torch
import transformers
from transformers import AutoModelForCausalLM

from jetson_ft.kernels import attention_trial
from jetson_ft.kernels.attention_trial import packing_obstacle

OUTSIDE = "outside of attention"
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def test_phi_and_llama_can_be_packed(model: Any) -> None:
    assert packing_obstacle(model) is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma2", "qwen3_moe", "phi3"])
def test_attention_alone_can_be_packed_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    assert packing_obstacle(tiny_architectures.tiny_model(kind).to(dtype)) is None


# Convolutions and recurrences, some of which change a row's losses by no more than 2e-4.
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    "kind",
    ["recurrent_gemma", "lfm2", "lfm2_moe", "qwen3_next", "falcon_h1", "qwen3_5_text", "mamba",
     "zaya"],
)  # fmt: skip
def test_a_state_between_rows_is_found_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    obstacle = packing_obstacle(tiny_architectures.tiny_model(kind).to(dtype))
    assert OUTSIDE in str(obstacle)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "lfm2", "qwen3_next", "falcon_h1"])
def test_a_state_is_found_in_weights_as_they_are_initialized(kind: str) -> None:
    """Small weights: the state hardly changes the next row."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_architectures.tiny_config(kind)).eval()
    assert OUTSIDE in str(packing_obstacle(model))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize(("kind", "packed"), [("qwen3", True), ("lfm2", False)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_quantized_models_are_judged_like_others(
    quantize: str, kind: str, packed: bool, precision: str, tmp_path: Path
) -> None:
    from jetson_ft.models.files import resolve_model
    from jetson_ft.models.loading import WeightFormat, load_model

    config = tiny_architectures.tiny_config(kind)
    config.hidden_size = config.intermediate_size = 64  # nf4 has blocks of 64 weights
    config.head_dim = 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path)), WeightFormat(precision, quantize), "cpu")
    obstacle = packing_obstacle(model)
    assert (obstacle is None) == packed, obstacle


def test_a_state_through_token_ids_alone_is_found(model: Any) -> None:
    """As in n-gram embeddings: the embedding's gradient and a NaN in it show nothing."""
    embedding = model.get_input_embeddings()

    def add_previous(_module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        previous = inputs[0].roll(1, 1)
        previous[:, 0] = 0
        return output + 0.1 * embedding.weight[previous]

    embedding.register_forward_hook(add_previous)
    assert "logits" in str(packing_obstacle(model))


@pytest.mark.parametrize(("longest", "packed"), [(400, True), (700, False)])
def test_rotary_embeddings_that_depend_on_the_longest_row_prevent_packing(
    longest: int, packed: bool
) -> None:
    """The short rows beside a row of over 512 tokens would get that row's angles."""
    config = tiny_architectures.tiny_config("phi3")
    config.max_position_embeddings, config.original_max_position_embeddings = 2048, 512
    half = config.hidden_size // config.num_attention_heads // 2
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half,
        "long_factor": [4.0] * half, "original_max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 150, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        assert (packing_obstacle(model, longest) is None) == packed
        assert torch.equal(model(ids).logits, before)


def test_positions_longer_than_the_models_table_are_not_tried() -> None:
    model = tiny_architectures.tiny_model("gpt2")
    assert packing_obstacle(model, 10**6) is None


SMALL: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
# Distances in place of positions, attention that can't be replaced, states that continue from row
# to row, capped scores, sinks, masks made in the layer.
CANNOT = {
    "GPT-OSS": lambda: transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4),
    "Doge": lambda: transformers.DogeConfig(**GROUPED),
    "Bloom": lambda: transformers.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
    "GPT-J": lambda: transformers.GPTJConfig(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=0, eos_token_id=0
    ),
    "Falcon": lambda: transformers.FalconConfig(**SMALL, alibi=True),
    "Mamba": lambda: transformers.MambaConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=2, pad_token_id=None
    ),
    "LFM2": lambda: transformers.Lfm2Config(
        **SMALL,
        intermediate_size=64,
        num_key_value_heads=2,
        initializer_range=0.3,
        layer_types=["conv", "full_attention"],
    ),
}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GPT-OSS", "s_aux"),
        ("Doge", "packed rows"),
        ("Bloom", "can't be replaced"),
        ("GPT-J", "can't be replaced"),
        ("Falcon", "can't be replaced"),
        ("Mamba", OUTSIDE),
        ("LFM2", OUTSIDE),
    ],
)
def test_a_model_whose_rows_affect_each_other_has_an_obstacle(name: str, reason: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CANNOT[name]()).eval()
    before = model.config._attn_implementation
    assert reason in str(packing_obstacle(model))
    assert model.config._attn_implementation == before


def test_lack_of_memory_in_the_trial_is_raised(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack_memory(**_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(
        attention_trial, "use_packed_attention", lambda _: nullcontext(lack_memory())
    )
    with pytest.raises(torch.OutOfMemoryError):
        packing_obstacle(model)


def test_the_trial_restores_the_mode_and_the_embedding(model: Any) -> None:
    model.train()
    assert packing_obstacle(model) is None
    assert model.training
    assert not model.get_input_embeddings()._forward_hooks


def test_the_trial_takes_three_short_forward_passes(model: Any) -> None:
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, options: sizes.append(options["input_ids"].numel()),
        with_kwargs=True,
    )
    assert packing_obstacle(model) is None
    assert len(sizes) == 3 and max(sizes) <= 40
