"""The catalog has the dimensions of the real models; any architecture can be counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jetson_ft import adapter
from jetson_ft.models import catalog, dims, loading
from jetson_ft.models.catalog import KNOWN_DIMS
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import LoraRecipe


def configs() -> dict[str, Any]:
    from transformers import LlamaConfig, PhiConfig

    return {
        "microsoft/phi-1_5": PhiConfig(),
        "embedded": LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["microsoft/phi-1_5", "embedded"])
def test_the_catalog_equals_the_real_models(name: str) -> None:
    assert dims.dims_from_config(configs()[name]) == KNOWN_DIMS[name]


def test_phi_has_its_published_parameters() -> None:
    phi = KNOWN_DIMS["microsoft/phi-1_5"]
    assert phi.parameters == 1_418_270_720
    assert phi.linear_parameters == 1_207_959_552
    assert phi.embedding_parameters == 104_857_600 and not phi.tied
    assert KNOWN_DIMS["embedded"].parameters == 134_515_008


@pytest.mark.parametrize("model", ["tiny_phi", "tiny_llama"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["k_proj", "self_attn.v_proj"]])
def test_parameters_are_those_of_the_loaded_model(
    model: str, targets: Any, request: pytest.FixtureRequest
) -> None:
    base = BaseModelFiles(model, request.getfixturevalue(model))
    shape = catalog.model_dims(base)
    loaded = loading.load_model(base, loading.WeightFormat("fp32"), "cpu")
    assert sum(p.numel() for p in loaded.parameters()) == shape.parameters
    lora = LoraRecipe(rank=3, target_modules=targets)
    trained = adapter.attach_adapter(loaded, lora, 0).get_nb_trainable_parameters()[0]
    assert trained == shape.lora_parameters(3, targets)


def test_gpt2_with_its_own_names_is_counted() -> None:
    from transformers import GPT2Config

    shape = dims.dims_from_config(GPT2Config())
    assert shape.parameters == 124_439_808 and shape.tied
    assert (shape.layers, shape.hidden, shape.intermediate) == (12, 768, 3072)
    assert shape.norms_per_layer == 2
    assert shape.linear_parameters == 12 * 12 * 768**2


def test_a_layer_number_in_a_target_means_every_layer() -> None:
    phi = KNOWN_DIMS["microsoft/phi-1_5"]
    assert phi.lora_parameters(8, ["layers.3.mlp.fc1"]) == phi.lora_parameters(8, ["mlp.fc1"])


def test_an_unknown_architecture_is_a_user_error(tmp_path: Path) -> None:
    from jetson_ft.errors import UserError

    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UserError, match="can't be loaded"):
        catalog.model_dims(BaseModelFiles("broken", tmp_path))
