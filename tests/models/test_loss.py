"""The loss of packed rows is the loss of the rows; a score counts answers alone."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig

from jetson_ft.data.template import ANSWER, CONTEXT, END
from jetson_ft.models import attention, loss
from jetson_ft.models.attention import packed
from jetson_ft.models.loss import head_losses, score, token_losses, without_head
from jetson_ft.models.packing import pack, packs


def make_rows(opening: int = 0) -> list[dict[str, Any]]:
    """Rows of random ids: a context of 3, an answer, an end, a token of layout.

    All behind the same `opening` tokens more of context.
    """
    random = torch.Generator().manual_seed(2)
    rows = []
    for answer in (4, 1, 7):
        parts = [CONTEXT] * 3 + [ANSWER] * answer + [END, CONTEXT]
        ids = torch.randint(3, 259, (len(parts),), generator=random)
        ids = [*range(5, 5 + opening), *ids.tolist()]
        rows.append({"input_ids": ids, "parts": [CONTEXT] * opening + parts})
    return rows


OPENINGS = pytest.mark.parametrize("opening", [0, 4])


@pytest.fixture(params=["tiny_phi", "tiny_llama"])
def model(request: pytest.FixtureRequest) -> Any:
    folder: Path = request.getfixturevalue(request.param)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def own_loss(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """What transformers itself makes of a row, summed over its learnt tokens."""
    ids = torch.tensor([row["input_ids"]])
    learnt = torch.tensor([row["parts"]]) != CONTEXT
    labels = torch.where(learnt, ids, -100)
    return model(input_ids=ids, labels=labels).loss * int(learnt.sum())


@OPENINGS
def test_the_loss_of_a_pack_is_transformers_own_on_the_rows(model: Any, opening: int) -> None:
    rows = make_rows(opening)
    assert pack(rows).opening == opening
    with packed(model):
        losses = token_losses(model, pack(rows))
    assert losses.shape == (4 + 1 + 7 + 3,)
    expected = sum(own_loss(model, row) for row in rows)
    assert float(losses.sum().detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@OPENINGS
@pytest.mark.parametrize("blocks", [True, False], ids=["as on a CPU", "as on a GPU"])
def test_the_gradient_of_a_pack_is_the_rows_own(
    model: Any, opening: int, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_takes_blocks", lambda _: blocks)
    rows = make_rows(opening)
    weight = model.get_input_embeddings().weight
    with packed(model):
        (mine,) = torch.autograd.grad(token_losses(model, pack(rows)).sum(), weight)
    (own,) = torch.autograd.grad(sum(own_loss(model, row) for row in rows), weight)
    assert float(own.abs().max()) > 0.01
    assert torch.allclose(mine, own, atol=1e-5)


def test_losses_are_fp32_whatever_the_model_computes_in(model: Any) -> None:
    model.to(torch.bfloat16)
    assert token_losses(model, pack(make_rows()[:1])).dtype == torch.float32


def test_several_rows_need_packed_attention(model: Any) -> None:
    with pytest.raises(ValueError, match="need packed attention"):
        token_losses(model, pack(make_rows()))


def test_a_row_alone_needs_none(model: Any) -> None:
    row = make_rows()[0]
    mine = token_losses(model, pack([row])).sum()
    assert float(mine.detach()) == pytest.approx(float(own_loss(model, row).detach()), rel=1e-5)


def test_a_model_that_can_not_pack_still_trains_row_by_row() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4)
    bloom = AutoModelForCausalLM.from_config(config).eval()
    row = make_rows()[0]
    mine = token_losses(bloom, pack([row])).sum()
    assert float(mine.detach()) == pytest.approx(float(own_loss(bloom, row).detach()), rel=1e-5)


# Scores


def test_a_score_leaves_out_the_end_tokens(model: Any) -> None:
    rows = make_rows()
    answers_only = [
        row | {"parts": [p if p == ANSWER else CONTEXT for p in row["parts"]]} for row in rows
    ]
    with torch.no_grad():
        nats = float(sum(own_loss(model, row) for row in answers_only))
    with packed(model):
        found = score(model, packs(rows, 100), characters=5)
    assert found.loss == pytest.approx(nats / (4 + 1 + 7), rel=1e-5)
    assert found.bits_per_char == pytest.approx(nats / math.log(2) / 5, rel=1e-5)


def test_a_score_does_not_depend_on_how_rows_are_packed(model: Any) -> None:
    with packed(model):
        one, three = (score(model, packs(make_rows(), size), 5) for size in (100, 0))
    assert one.loss == pytest.approx(three.loss, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_score_is_taken_without_dropout_and_leaves_the_mode(
    tiny_phi: Path, training: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_phi, resid_pdrop=0.5, embd_pdrop=0.5)
    model.train(training)
    first, second = (score(model, [pack(make_rows()[:1])], 5) for _ in range(2))
    assert first == second
    assert model.training is training


def test_a_score_of_nothing_is_zero(model: Any) -> None:
    assert score(model, [], 0).loss == 0


# The head, applied to chunks


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 15, 16, 40])
def test_the_loss_of_chunks_is_the_loss_of_all(
    rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "head_rows", lambda *_: (16, 5))
    torch.manual_seed(0)
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, bias = torch.randn(30, 8), torch.randn(30) if with_bias else None
    targets, slopes = torch.randint(30, (rows,)), torch.randn(rows)
    mine = head_losses(hidden, weight, bias, targets)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    own = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(mine, own, atol=1e-5)
    (found,) = torch.autograd.grad((mine * slopes).sum(), hidden)
    (expected,) = torch.autograd.grad((own * slopes).sum(), hidden)
    assert torch.allclose(found, expected, atol=1e-5)


def test_in_bf16_the_softmax_of_each_piece_is_made_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "head_rows", lambda *_: (16, 5))
    torch.manual_seed(0)
    hidden = torch.randn(40, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, targets = torch.randn(30, 8, dtype=torch.bfloat16), torch.randint(30, (40,))
    losses = head_losses(hidden, weight, None, targets)
    logits = (hidden.detach() @ weight.t()).float()
    own = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, own, atol=1e-5)
    (found,) = torch.autograd.grad(losses.sum(), hidden)
    one_hot = torch.nn.functional.one_hot(targets, 30)
    expected = (logits.softmax(-1) - one_hot) @ weight.float()
    assert torch.allclose(found.float(), expected, atol=0.05)


def test_a_hopeless_prediction_has_a_finite_loss() -> None:
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert head_losses(hidden, weight, None, torch.tensor([1])).tolist() == [400.0]


def test_without_head_loss_and_gradient_stay_and_the_head_comes_back(model: Any) -> None:
    model.requires_grad_(False)
    trained = model.model.layers[0].mlp.parameters().__next__().requires_grad_()
    results = []
    for context in (nullcontext(), without_head(model)):
        with context, packed(model):
            losses = token_losses(model, pack(make_rows()))
        (gradient,) = torch.autograd.grad(losses.sum(), trained)
        results.append((losses.detach(), gradient))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 259)


def test_a_head_whose_logits_are_scaled_afterwards_stays() -> None:
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, logits_scaling=4.0,
    )  # fmt: skip
    granite = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with without_head(granite), packed(granite):
        mine = token_losses(granite, pack(make_rows())).sum()
    expected = sum(own_loss(granite, row) for row in make_rows())
    assert float(mine) == pytest.approx(float(expected), rel=1e-5)
