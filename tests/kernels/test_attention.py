"""Rows of a pack keep to themselves, as they don't with attention as it comes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from jetson_ft.kernels import attention
from jetson_ft.kernels.attention import (
    PACKED_ATTENTION,
    packed_attention,
    supports_packing,
    use_packed_attention,
)
from jetson_ft.kernels.packing import Pack, pack_rows

LENGTHS = [5, 1, 9, 3]
SMALL: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def random_rows() -> list[dict[str, Any]]:
    """Rows of random ids whose tokens are all trained on."""
    ids = torch.randint(3, 259, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "segments": torch.ones(len(row))} for row in ids.split(LENGTHS)]


def rows_with_prefix() -> list[dict[str, Any]]:
    """Return `random_rows`, each after the same three tokens, which are not trained on."""
    shared_prefix = torch.tensor([5, 6, 7])
    return [
        {name: torch.cat([first, row[name]]) for name, first in
         (("input_ids", shared_prefix), ("segments", torch.zeros(3)))}
        for row in random_rows()
    ]  # fmt: skip


ROWS = pytest.mark.parametrize("rows", [random_rows(), rows_with_prefix()], ids=["apart", "prefix"])


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def alone(model: Any, rows: Any = None) -> torch.Tensor:
    """Return the logits of each row given alone; of a shared prefix, the first row's."""
    rows = rows or random_rows()
    logits = [model(row["input_ids"][None]).logits[0] for row in rows]
    shared_prefix = pack_rows(rows).shared_prefix
    return torch.cat([logits[0], *(own[shared_prefix:] for own in logits[1:])])


@torch.no_grad()
def together(model: Any, rows: Any = None) -> torch.Tensor:
    pack: Pack = pack_rows(rows or random_rows())
    with use_packed_attention(model):
        return model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            row_lengths=pack.row_lengths,
            shared_prefix=pack.shared_prefix,
            use_cache=False,
        ).logits[0]


@ROWS
@pytest.mark.usefixtures("blocks")
def test_packed_rows_give_the_logits_of_each_row_alone(model: Any, rows: Any) -> None:
    assert torch.allclose(together(model, rows), alone(model, rows), atol=1e-5)


def test_rows_with_a_prefix_share_it() -> None:
    assert pack_rows(rows_with_prefix()).shared_prefix == 3
    assert pack_rows(random_rows()).shared_prefix == 0


def test_without_packed_attention_rows_influence_each_other(model: Any) -> None:
    # Why packed attention exists: an all-ones mask, as data collators make one, lets a row
    # attend to those before it. Only the first row is unaffected.
    pack = pack_rows(random_rows())
    with torch.no_grad():
        leaking = model(
            input_ids=pack.input_ids,
            position_ids=pack.position_ids,
            attention_mask=torch.ones_like(pack.input_ids),
        ).logits[0]
    difference = (leaking - alone(model)).abs().amax(1)
    assert model.config._attn_implementation == "sdpa"
    assert float(difference[: LENGTHS[0]].max()) < 1e-5
    assert float(difference[LENGTHS[0] :].min()) > 1e-3


def test_leaving_packed_attention_restores_the_models_own(model: Any) -> None:
    with pytest.raises(KeyError), use_packed_attention(model):
        assert model.config._attn_implementation == PACKED_ATTENTION
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_packed_attention_without_bounds_is_refused(model: Any) -> None:
    with use_packed_attention(model), pytest.raises(ValueError, match="without row_lengths"):
        model(torch.tensor([[5, 6, 7]]))


@ROWS
def test_a_sliding_window_applies_within_a_row(rows: Any) -> None:
    narrow, wide = (
        build(
            transformers.MistralConfig(
                **SMALL,
                intermediate_size=64,
                num_key_value_heads=2,
                sliding_window=window,
                initializer_range=0.3,
            )
        )
        for window in (4, None)
    )
    assert torch.allclose(together(narrow, rows), alone(narrow, rows), atol=1e-4)
    assert not torch.allclose(together(narrow, rows), alone(wide, rows), atol=1e-1)


def test_a_position_attends_to_itself_and_its_window() -> None:
    length, window = 6, 3
    query = torch.zeros(1, 1, length, length)  # equal scores: the mean of the values attended to
    value = torch.eye(length)[None, None]
    attended, _ = packed_attention(
        None, query, query, value, None, row_lengths=[length], sliding_window=window
    )
    expected = torch.ones(length, length).tril().triu(1 - window)
    assert torch.equal(attended[0, :, 0] > 0, expected > 0)


def test_phi_and_llama_support_packing(model: Any) -> None:
    assert supports_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_lack_of_memory_in_the_trial_of_packing_is_raised(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack_memory(**_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "use_packed_attention", lambda _: nullcontext(lack_memory()))
    with pytest.raises(torch.OutOfMemoryError):
        supports_packing(model)


@pytest.mark.parametrize("format", [torch.bfloat16, torch.float16])
def test_low_precision_supports_packing(model: Any, format: torch.dtype) -> None:
    assert supports_packing(model.to(format))


GROUPED: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
# Distances in place of positions, attention that can't be replaced, states that continue from row
# to row, capped scores, sinks, masks made in the layer.
CANNOT = {
    "Gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8),
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
    ("changed", "computed"),
    [({"softcap": 50.0}, False), ({"s_aux": torch.zeros(1)}, False),
     ({"position_bias": torch.zeros(1)}, False), ({"is_causal": False}, False),
     ({"softcap": None}, True), ({"position_ids": torch.zeros(1), "use_cache": False}, True)],
)  # fmt: skip
def test_an_argument_that_would_change_the_result_is_refused(
    changed: dict[str, Any], computed: bool
) -> None:
    query = torch.zeros(1, 1, 3, 4)
    with nullcontext() if computed else pytest.raises(ValueError, match=next(iter(changed))):
        packed_attention(None, query, query, query, None, row_lengths=[3], **changed)


def test_a_mask_is_refused() -> None:
    query = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="attention_mask"):
        packed_attention(None, query, query, query, torch.ones(3, 3), row_lengths=[3])


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_whose_rows_affect_each_other_does_not_support_packing(name: str) -> None:
    model = build(CANNOT[name]())
    before = model.config._attn_implementation
    assert not supports_packing(model)
    assert model.config._attn_implementation == before
