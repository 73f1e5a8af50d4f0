"""Which models have a table of positions, and rows that are longer than it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.models import positions
from jetson_ft.models.files import BaseModelFiles

LIMIT = 32  # also the hidden size, so that weights have the size of a table


def config(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    wanted = {
        "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": LIMIT, "rotary_dim": 8,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48,
        "max_position_embeddings": LIMIT, "max_seq_len": LIMIT,
        "d_model": 32, "n_heads": 4, "n_layers": 2, "dff": 48, "ffn_dim": 48, "num_layers": 2,
        "decoder_layers": 2, "attention_heads": 4, "num_heads": 4, "word_embed_proj_dim": 32,
        "attention_types": [[["global", "local"], 1]],
    }  # fmt: skip
    default = cls()
    names = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    return cls(**{name: value for name, value in wanted.items() if name in names})


def can_read(made: Any, tokens: int) -> bool:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(made).eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, tokens), 5), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    "kind",
    ["gpt2", "opt", "gpt_neo", "gpt_bigcode", "gptj", "codegen", "openai-gpt", "biogpt", "ctrl",
     "mpt"],
)  # fmt: skip
def test_table_ends_where_the_model_does(kind: str) -> None:
    made = config(kind)
    assert positions.max_positions(made) == positions.config_table_size(made) == LIMIT
    assert can_read(made, LIMIT)
    assert not can_read(made, LIMIT + 1)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("llama", LIMIT), ("phi", LIMIT), ("qwen2", LIMIT), ("gemma2", LIMIT), ("gpt_neox", LIMIT),
     ("xglm", LIMIT), ("bloom", None)],
)  # fmt: skip
def test_computed_positions_are_no_table(kind: str, limit: int | None) -> None:
    made = config(kind)
    assert positions.max_positions(made) == limit
    assert positions.config_table_size(made) is None
    assert can_read(made, LIMIT + 1)


def test_table_of_the_image_part_is_not_the_texts() -> None:
    from transformers import CONFIG_MAPPING, Gemma3Config

    text = config("gemma3_text").to_dict()
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    made = Gemma3Config(text_config=CONFIG_MAPPING["gemma3_text"](**text), vision_config=vision)
    assert positions.max_positions(made) == LIMIT
    assert positions.config_table_size(made) is None


@pytest.mark.parametrize(
    ("kind", "longest", "outcome"),
    [
        ("gpt2", LIMIT, "fine"), ("gpt2", LIMIT + 1, "refused"), ("opt", LIMIT, "fine"),
        ("opt", LIMIT + 1, "refused"), ("llama", LIMIT, "fine"), ("llama", LIMIT + 1, "warned"),
        ("bloom", 10_000, "fine"),
    ],
)  # fmt: skip
def test_longest_row_is_refused_by_a_table_and_else_warned_about(
    tmp_path: Path, kind: str, longest: int, outcome: str
) -> None:
    config(kind).save_pretrained(tmp_path)
    base = BaseModelFiles("mine", tmp_path)
    refusal = pytest.raises(UserError, match=r"reads 32 tokens at most.* longest row has 33")
    with refusal if outcome == "refused" else nullcontext() as caught:
        warning = positions.check_longest_row(base, longest)
    if outcome == "refused":
        assert str(caught.value.where) == "mine" and "`data.max_length` to 32" in str(caught.value)
    elif outcome == "warned":
        assert "33 tokens" in str(warning) and "`data.max_length: 32`" in str(warning)
    else:
        assert warning is None
