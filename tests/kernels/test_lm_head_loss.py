"""The loss of packed rows is the loss of the rows; a score counts answers alone."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig

from jetson_ft.data.chat_template import ANSWER, CONTEXT, END
from jetson_ft.kernels import lm_head_loss
from jetson_ft.kernels.attention import use_packed_attention
from jetson_ft.kernels.lm_head_loss import (
    chunked_lm_head,
    head_losses,
    score_packs,
    score_rows,
    token_losses,
)
from jetson_ft.kernels.packing import make_packs, pack_rows


def make_rows(shared_prefix: int = 0) -> list[dict[str, Any]]:
    """Rows of random ids: a context of 3, an answer, an end, a token of layout.

    All behind the same `shared_prefix` tokens more of context.
    """
    random = torch.Generator().manual_seed(2)
    rows = []
    for answer in (4, 1, 7):
        parts = [CONTEXT] * 3 + [ANSWER] * answer + [END, CONTEXT]
        ids = torch.randint(3, 259, (len(parts),), generator=random)
        ids = [*range(5, 5 + shared_prefix), *ids.tolist()]
        rows.append({"input_ids": ids, "segments": [CONTEXT] * shared_prefix + parts})
    return rows


PREFIXES = pytest.mark.parametrize("shared_prefix", [0, 4])


def own_loss(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """What transformers itself makes of a row, summed over its trained tokens."""
    ids = torch.tensor([row["input_ids"]])
    trained = torch.tensor([row["segments"]]) != CONTEXT
    labels = torch.where(trained, ids, -100)
    return model(input_ids=ids, labels=labels).loss * int(trained.sum())


@PREFIXES
def test_the_loss_of_a_pack_is_transformers_own_on_the_rows(model: Any, shared_prefix: int) -> None:
    rows = make_rows(shared_prefix)
    assert pack_rows(rows).shared_prefix == shared_prefix
    with use_packed_attention(model):
        losses = token_losses(model, pack_rows(rows))
    assert losses.shape == (4 + 1 + 7 + 3,)
    expected = sum(own_loss(model, row) for row in rows)
    assert float(losses.sum().detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@PREFIXES
@pytest.mark.usefixtures("blocks")
def test_the_gradient_of_a_pack_is_the_rows_own(model: Any, shared_prefix: int) -> None:
    rows = make_rows(shared_prefix)
    weight = model.get_input_embeddings().weight
    with use_packed_attention(model):
        (ours,) = torch.autograd.grad(token_losses(model, pack_rows(rows)).sum(), weight)
    (own,) = torch.autograd.grad(sum(own_loss(model, row) for row in rows), weight)
    assert float(own.abs().max()) > 0.01
    assert torch.allclose(ours, own, atol=1e-5)


def test_losses_are_fp32_whatever_the_model_computes_in(model: Any) -> None:
    model.to(torch.bfloat16)
    assert token_losses(model, pack_rows(make_rows()[:1])).dtype == torch.float32


def test_several_rows_need_packed_attention(model: Any) -> None:
    with pytest.raises(ValueError, match="needs packed attention"):
        token_losses(model, pack_rows(make_rows()))


def test_a_row_alone_needs_no_packed_attention(model: Any) -> None:
    row = make_rows()[0]
    ours = token_losses(model, pack_rows([row])).sum()
    assert float(ours.detach()) == pytest.approx(float(own_loss(model, row).detach()), rel=1e-5)


def test_a_model_without_packing_trains_row_by_row() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)
    bloom = AutoModelForCausalLM.from_config(config).eval()
    row = make_rows()[0]
    ours = token_losses(bloom, pack_rows([row])).sum()
    assert float(ours.detach()) == pytest.approx(float(own_loss(bloom, row).detach()), rel=1e-5)


# Scores


def test_a_score_leaves_out_the_end_tokens(model: Any) -> None:
    rows = make_rows()
    answers_only = [
        row | {"segments": [p if p == ANSWER else CONTEXT for p in row["segments"]]} for row in rows
    ]
    with torch.no_grad():
        nats = float(sum(own_loss(model, row) for row in answers_only))
    with use_packed_attention(model):
        score = score_packs(model, make_packs(rows, 100), characters=5)
    assert score.loss == pytest.approx(nats / (4 + 1 + 7), rel=1e-5)
    assert score.bits_per_char == pytest.approx(nats / math.log(2) / 5, rel=1e-5)


def test_a_score_does_not_depend_on_how_rows_are_packed(model: Any) -> None:
    with use_packed_attention(model):
        one, three = (score_packs(model, make_packs(make_rows(), size), 5) for size in (100, 0))
    assert one.loss == pytest.approx(three.loss, rel=1e-5)


def test_scores_of_rows_are_those_of_each_row_alone(model: Any) -> None:
    rows = make_rows()
    with use_packed_attention(model):
        nats, tokens = score_rows(model, make_packs(rows, 100), len(rows) + 1)
        alone = [score_packs(model, [pack_rows([row])], 1) for row in rows]
    assert tokens == [sum(part == ANSWER for part in row["segments"]) for row in rows] + [0]
    expected = [score.loss * count for score, count in zip(alone, tokens, strict=False)]
    assert nats == pytest.approx([*expected, 0.0], rel=1e-5)
    assert len(set(nats)) == len(nats), "the test's rows differ"


@pytest.mark.parametrize("training", [True, False])
def test_scoring_switches_dropout_off_and_restores_the_mode(tiny_phi: Path, training: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_phi, resid_pdrop=0.5, embd_pdrop=0.5)
    model.train(training)
    first, second = (score_packs(model, [pack_rows(make_rows()[:1])], 5) for _ in range(2))
    assert first == second
    assert model.training is training


def test_a_score_of_nothing_is_zero(model: Any) -> None:
    assert score_packs(model, [], 0).loss == 0


# The head, applied to chunks


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 15, 16, 40])
def test_the_loss_of_chunks_is_the_loss_of_all(
    rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head_loss, "head_chunk_rows", lambda *_: (16, 5))
    torch.manual_seed(0)
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, bias = torch.randn(30, 8), torch.randn(30) if with_bias else None
    targets, grad_hidden = torch.randint(30, (rows,)), torch.randn(rows)
    ours = head_losses(hidden, weight, bias, targets)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    own = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(ours, own, atol=1e-5)
    (actual,) = torch.autograd.grad((ours * grad_hidden).sum(), hidden)
    (expected,) = torch.autograd.grad((own * grad_hidden).sum(), hidden)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_in_bf16_the_softmax_is_computed_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_head_loss, "head_chunk_rows", lambda *_: (16, 5))
    torch.manual_seed(0)
    hidden = torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, targets = torch.randn(30, 8, dtype=torch.bfloat16), torch.randint(30, (40,))
    losses = head_losses(hidden, weight, None, targets)
    logits = (hidden.detach() @ weight.t()).float()
    own = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, own, atol=1e-5)
    (actual,) = torch.autograd.grad(losses.sum(), hidden)
    one_hot = torch.nn.functional.one_hot(targets, 30)
    expected = (logits.softmax(-1) - one_hot) @ weight.float()
    assert torch.allclose(actual.float(), expected, atol=0.05)


def test_a_prediction_of_zero_probability_has_a_finite_loss() -> None:
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert head_losses(hidden, weight, None, torch.tensor([1])).tolist() == [400.0]


def test_chunked_lm_head_gives_the_same_loss_and_gradient_then_restores_the_head(
    model: Any,
) -> None:
    model.requires_grad_(False)
    trained = model.model.layers[0].mlp.parameters().__next__().requires_grad_()
    results = []
    for context in (nullcontext(), chunked_lm_head(model)):
        with context, use_packed_attention(model):
            losses = token_losses(model, pack_rows(make_rows()))
        (gradient,) = torch.autograd.grad(losses.sum(), trained)
        results.append((losses.detach(), gradient))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 259)


def test_a_head_with_scaled_logits_is_not_chunked() -> None:
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, logits_scaling=4.0,
    )  # fmt: skip
    granite = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with chunked_lm_head(granite), use_packed_attention(granite):
        ours = token_losses(granite, pack_rows(make_rows())).sum()
    expected = sum(own_loss(granite, row) for row in make_rows())
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
