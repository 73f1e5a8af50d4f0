"""Rows of a pack keep to themselves, as they don't with attention as it comes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from jetson_ft.kernels.attention import (
    PACKED_ATTENTION,
    PackingError,
    WindowMask,
    packed_attention,
    use_packed_attention,
)
from jetson_ft.kernels.lm_head_loss import token_losses
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
        None, query, query, value, WindowMask(window), row_lengths=[length]
    )
    expected = torch.ones(length, length).tril().triu(1 - window)
    assert torch.equal(attended[0, :, 0] > 0, expected > 0)


GROUPED: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}


@ROWS
@pytest.mark.parametrize("softcap", [50.0, 5.0])
@pytest.mark.usefixtures("blocks")
def test_soft_capped_scores_give_eager_attentions_loss_and_adapter_gradients(
    softcap: float, rows: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=softcap,
        query_pre_attn_scalar=4, initializer_range=0.3,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                      init_lora_weights=False)  # fmt: skip
    model = get_peft_model(build(config), lora)
    model.set_attn_implementation("eager")
    assert config.layer_types == ["sliding_attention", "full_attention"]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    pack = pack_rows(rows)
    with use_packed_attention(model):
        together = token_losses(model, pack).mean()
        actual = gradients(together)
    alone = torch.cat([token_losses(model, pack_rows([row])) for row in rows]).mean()
    assert abs(float(together) - float(alone)) < 1e-5
    for a, b in zip(actual, gradients(alone), strict=True):
        assert float(b.abs().max()) > 1e-3
        assert torch.allclose(a, b, atol=1e-5)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped = torch.cat([token_losses(model, pack_rows([row])) for row in rows]).mean()
    assert abs(float(uncapped) - float(alone)) > 1e-4  # the cap matters


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shared_prefix", [0, 4])
def test_one_row_at_a_time_gives_the_same(shared_prefix: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    rows = [9, 6, 14]
    tokens = sum(rows) - 2 * shared_prefix
    query, key, value = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    together, alone = (
        packed_attention(
            None, query, key, value, WindowMask(5), row_lengths=rows,
            shared_prefix=shared_prefix, softcap=softcap, one_by_one=one_by_one,
        )[0]
        for one_by_one in (False, True)
    )  # fmt: skip
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.usefixtures("blocks")
def test_one_row_at_a_time_keeps_a_nan_in_its_row() -> None:
    query = torch.randn(1, 2, 9, 4)
    query[:, :, :4] = torch.nan
    out, _ = packed_attention(None, query, query, query, None, row_lengths=[4, 5], one_by_one=True)
    assert out[0, :4].isnan().all() and out[0, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "computed"),
    [({"s_aux": torch.zeros(1)}, False),
     ({"position_bias": torch.zeros(1)}, False), ({"is_causal": False}, False),
     ({"softcap": 50.0}, True), ({"softcap": None}, True),
     ({"sliding_window": 2}, False), ({"sliding_window": None}, True),
     ({"position_ids": torch.zeros(1), "use_cache": False}, True)],
)  # fmt: skip
def test_an_argument_that_would_change_the_result_is_refused(
    changed: dict[str, Any], computed: bool
) -> None:
    query = torch.zeros(1, 1, 3, 4)
    with nullcontext() if computed else pytest.raises(PackingError, match=next(iter(changed))):
        packed_attention(None, query, query, query, None, row_lengths=[3], **changed)


def test_a_mask_is_refused() -> None:
    query = torch.zeros(1, 1, 3, 4)
    with pytest.raises(PackingError, match="attention_mask"):
        packed_attention(None, query, query, query, torch.ones(3, 3), row_lengths=[3])


def test_a_window_other_than_the_masks_is_refused() -> None:
    query = torch.zeros(1, 1, 3, 4)
    with pytest.raises(PackingError, match="sliding_window"):
        packed_attention(
            None, query, query, query, WindowMask(2), row_lengths=[3], sliding_window=3
        )


@pytest.mark.parametrize("keys", [2, 4])
def test_keys_of_other_tokens_are_refused(keys: int) -> None:
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, keys, 4)
    with pytest.raises(PackingError, match="key"):
        packed_attention(None, query, key, key, None, row_lengths=[3])
