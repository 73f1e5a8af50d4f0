"""Built-in dimensions are those of the real models, and any architecture can be counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jetson_ft.models import adapter, load, shapes
from jetson_ft.models.resolve import Base
from jetson_ft.models.shapes import KNOWN
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


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes_are_those_of_the_models(name: str) -> None:
    assert shapes.from_config(configs()[name]) == KNOWN[name]


def test_phi_has_its_published_parameters() -> None:
    phi = KNOWN["microsoft/phi-1_5"]
    assert phi.parameters == 1_418_270_720
    assert phi.linear_parameters == 1_207_959_552
    assert phi.embedding_parameters == phi.head_parameters == 104_857_600
    assert KNOWN["embedded"].parameters == 134_515_008


@pytest.mark.parametrize("model", ["tiny_phi", "tiny_llama"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj", ["k_proj", "self_attn.v_proj"]])
def test_parameters_are_those_of_the_loaded_model(
    model: str, targets: Any, request: pytest.FixtureRequest
) -> None:
    base = Base(model, request.getfixturevalue(model))
    shape = shapes.of(base)
    loaded = load.load_model(base, load.Weights("fp32"), "cpu")
    assert sum(p.numel() for p in loaded.parameters()) == shape.parameters
    lora = LoraRecipe(rank=3, targets=targets)
    trained = adapter.attach(loaded, lora, 0).get_nb_trainable_parameters()[0]
    assert trained == shape.lora_parameters(3, targets)


def test_an_architecture_with_names_of_its_own_is_counted() -> None:
    from transformers import GPT2Config

    shape = shapes.from_config(GPT2Config())
    assert shape.parameters == 124_439_808 and shape.tied
    assert (shape.layers, shape.hidden, shape.intermediate, shape.norms) == (12, 768, 3072, 2)
    assert shape.linear_parameters == 12 * 12 * 768**2


def test_results_of_activations_that_are_made_again_arent_counted() -> None:
    """Where `models.fused` doesn't know the MLP, autograd keeps all that was multiplied."""
    from transformers import GemmaConfig, GPT2Config, LlamaConfig, Phi3Config, PhiConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 99, "pad_token_id": 0}  # fmt: skip
    known, eager = (LlamaConfig(**size), PhiConfig(**size)), (GemmaConfig(**size), GPT2Config())
    assert [shapes.from_config(config).kept_in_mlp for config in known] == [2, 1]
    assert [shapes.from_config(config).kept_in_mlp for config in eager] == [4, 2]
    assert shapes.from_config(Phi3Config(**size)).kept_in_mlp == 4


def test_results_of_norms_that_are_made_again_arent_counted_either() -> None:
    """They are where `models.fused` knows the norm and `models.lora` the layers behind it."""
    from transformers import GemmaConfig, GPT2Config, LlamaConfig, PhiConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
            "num_attention_heads": 2, "vocab_size": 99, "pad_token_id": 0}  # fmt: skip
    found = [
        shapes.from_config(config).kept_by_norms
        for config in (LlamaConfig(**size), PhiConfig(**size), GemmaConfig(**size), GPT2Config())
    ]
    assert found == [2, 1, 4, 4]


def test_a_layers_number_in_a_target_is_read_as_every_layer() -> None:
    phi = KNOWN["microsoft/phi-1_5"]
    assert phi.lora_parameters(8, ["layers.3.mlp.fc1"]) == phi.lora_parameters(8, ["mlp.fc1"])


def test_a_damaged_config_is_told_plainly(tmp_path: Path) -> None:
    from jetson_ft.errors import UserError

    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UserError, match="can't be loaded"):
        shapes.of(Base("broken", tmp_path))
