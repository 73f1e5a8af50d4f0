"""The table of layer families predicts what autograd keeps, and the patcher reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
)

from jetson_ft import adapter
from jetson_ft.data.lengths import lengths_from_counts
from jetson_ft.kernels import attention
from jetson_ft.kernels.families import FAMILIES, head_chunk_rows, saved_tensors
from jetson_ft.kernels.fused_layers import fuse_layers
from jetson_ft.models.dims import describe_module, dims_from_config
from jetson_ft.models.loading import WeightFormat
from jetson_ft.recipe import LoraRecipe, TrainRecipe
from jetson_ft.training import cost_model

SIZE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = SIZE | {
    "intermediate_size": 4 * 32, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0,
}  # fmt: skip
LORA = LoraRecipe(rank=3)
# Model, replaced families in one decoder layer, tensors kept as wide as hidden state and MLP.
MODELS = [
    (LlamaConfig, SIZE, {"rms_norm", "swiglu", "rotary"}, (2, 2)),
    (Qwen2Config, SIZE | {"num_key_value_heads": 1}, {"rms_norm", "swiglu", "rotary"}, (2, 2)),
    (PhiConfig, SIZE, {"layer_norm", "gelu_tanh", "rotary"}, (1, 1)),
    (GPTNeoXConfig, SIZE | {"use_parallel_residual": False}, {"layer_norm", "other_mlp"}, (2, 2)),
    (Phi3Config, SIZE, {"rms_norm", "other_gated_mlp"}, (2, 4)),
    (
        GemmaConfig,
        SIZE | {"head_dim": 16, "num_key_value_heads": 2},
        {"other_norm", "other_gated_mlp"},
        (4, 4),
    ),
    # Its Conv1D layers have PEFT's own adapters, which keep results that could be recomputed.
    (GPT2Config, GPT2, {"layer_norm", "gelu_tanh"}, (4, 2)),
]


def kept_bytes(one: Any, tokens: int) -> int:
    """Bytes of the distinct storages that a forward pass keeps, parameters left out."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(one).requires_grad_(False)
    model = adapter.attach_adapter(model, LORA, seed=0).train()
    fuse_layers(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        attention.use_packed_attention(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        ids = torch.arange(tokens)[None]
        out = model(input_ids=ids, position_ids=ids, row_lengths=[tokens], use_cache=False)
    assert out.logits.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("kind", "settings", "families", "counts"), MODELS)
def test_a_layer_keeps_the_predicted_bytes(
    kind: Any, settings: dict[str, Any], families: set[str], counts: tuple[int, int]
) -> None:
    """Of one layer and of one token alone: by the differences between two models and two rows."""
    few, many = 16, 48
    deep, flat = (
        kept_bytes(kind(**settings, num_hidden_layers=layers), many)
        - kept_bytes(kind(**settings, num_hidden_layers=layers), few)
        for layers in (3, 2)
    )
    dims = dims_from_config(kind(**settings, num_hidden_layers=3))
    assert saved_tensors(dims) == counts
    workload = cost_model.Workload(
        dims, WeightFormat("fp32"), LORA, TrainRecipe(), lengths_from_counts([many], [many]), 0.0
    )
    predicted = cost_model.layer_bytes(workload, attention_outputs_kept=1)
    statistics = 4 * 2 * dims.norms_per_layer  # a norm's mean and deviation
    assert predicted <= (deep - flat) / (many - few) <= predicted + statistics


@pytest.mark.parametrize(("kind", "settings", "families", "counts"), MODELS)
def test_fuse_layers_replaces_what_the_table_matches(
    kind: Any, settings: dict[str, Any], families: set[str], counts: Any
) -> None:
    model = AutoModelForCausalLM.from_config(kind(**settings, num_hidden_layers=1))
    replaced = {family.name for family in FAMILIES if family.replacement} & families
    assert fuse_layers(model).keys() == replaced
    for family in FAMILIES:
        if family.replacement:
            matches = any(family.matches(describe_module(module)) for module in model.modules())
            assert matches == (family.name in replaced)


def test_every_family_is_compared() -> None:
    assert {family.name for family in FAMILIES} == set().union(*(one[2] for one in MODELS))


@pytest.mark.parametrize("kind", [LlamaConfig, PhiConfig])
def test_layers_that_hold_their_inputs_recompute_nothing(kind: Any) -> None:
    dims = dims_from_config(kind(**SIZE, num_hidden_layers=5))
    hidden, intermediate = saved_tensors(dims)
    assert saved_tensors(dims, recompute=False) == (2 * hidden, intermediate + 1)


def test_a_large_vocabulary_has_small_chunks_of_logits() -> None:
    assert head_chunk_rows(49152, 2, "cpu") == (341, 42)
    assert head_chunk_rows(49152, 2, "cuda") == (341, 170)
    assert head_chunk_rows(10**7, 4, "cpu") == (16, 8)
