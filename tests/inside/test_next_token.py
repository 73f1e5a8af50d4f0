"""The distribution that is shown is the one that generation draws from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from jetson_ft.chat.session import ChatSession
from jetson_ft.data.chat_template import encode, encode_prompt
from jetson_ft.errors import UserError
from jetson_ft.inference import generate
from jetson_ft.inference.generate import Sampling
from jetson_ft.inside.model import each_side, logits_at
from jetson_ft.inside.next_token import _next_token, distributions, view_next_token, view_reply

DRAWS = 20_000


def prompt_of(loaded: ChatSession, text: str) -> list[int]:
    return encode_prompt(loaded.tokenizer, loaded.messages(text))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0),
        Sampling(temperature=0.5, top_k=20, top_p=0.8, repetition_penalty=1.3),
        Sampling(temperature=2.0, top_k=0, top_p=0.9, repetition_penalty=0.5),
        Sampling(temperature=0.05, top_k=5, top_p=1.0, repetition_penalty=2.0),
    ],
)
def test_generations_own_draws_have_the_distribution_shown(
    small: Callable[[str], ChatSession], sampling: Sampling
) -> None:
    """The total variation distance of n draws over k tokens is at most 0.4 sqrt(k / n) on average.

    Source: E|X - np| <= sqrt(2 np (1 - p) / pi) for a binomial X, nearly, and Cauchy-Schwarz.
    """
    loaded = small("llama")
    ids, rows = loaded.tokenizer("who-are-you")["input_ids"], 2000
    one_token = replace(sampling, max_new_tokens=1)
    torch.manual_seed(0)
    drawn = torch.cat([
        generate._generate(loaded.model, loaded.tokenizer, [ids] * rows, [2], one_token)[:, -1]
        for _ in range(DRAWS // rows)
    ])  # fmt: skip
    frequencies = drawn.bincount(minlength=160) / DRAWS
    with torch.inference_mode():
        logits = logits_at(loaded.model, ids, [len(ids) - 1])
        probs = distributions(logits, ids, sampling)[-1][1].softmax(0)
    kept = int((probs > 0).sum())
    distance = float((frequencies - probs).abs().sum() / 2)
    assert distance < 0.5 * (kept / DRAWS) ** 0.5
    assert not frequencies[probs == 0].any(), "a token that was cut is never drawn"
    assert kept == 160 if sampling.top_p == 1 and not sampling.top_k else kept < 160


def test_last_step_is_exactly_what_generation_scores(adapted: ChatSession) -> None:
    ids = prompt_of(adapted, "你好")
    for sampling in (
        Sampling(1, 0.7, 30, 0.8, 1.4),
        Sampling(1, repetition_penalty=1.7),
        Sampling(1),
    ):
        output: Any = generate._generate(
            adapted.model, adapted.tokenizer, [ids], [300], sampling,
            output_scores=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        steps = distributions(output.logits[0], ids, sampling)
        assert torch.equal(steps[-1][1], output.scores[0][0])
        if not sampling.temperature:
            side = view_next_token(adapted, "你好", sampling=sampling).sides["adapter"]
            assert side.greedy == output.sequences[0, -1]


def test_steps_are_the_settings_with_an_effect() -> None:
    def names(*values: Any) -> list[str]:
        return [name for name, _step in generate.sampling_steps(Sampling(*values))]

    everything = ["repetition_penalty", "temperature", "top_k", "top_p"]
    assert names(9, 0.7, 5, 0.9, 2) == everything
    assert names(9, 1, 0, 1, 1) == [] and names(9, 0, 5, 0.9, 2) == everything[:1]


def test_candidates_are_cut_and_scaled_step_by_step(adapted: ChatSession) -> None:
    sampling = Sampling(temperature=0.5, top_k=12, top_p=0.7, repetition_penalty=1.0)
    view = view_next_token(adapted, "你好", sampling=sampling, top=30)
    assert [token.id for token in view.tokens] == prompt_of(adapted, "你好")
    assert view.sides["base"] != view.sides["adapter"]
    for side in view.sides.values():
        assert [step.name for step in side.steps] == ["model", "temperature", "top_k", "top_p"]
        assert [step.kept for step in side.steps][:3] == [259, 259, 12] and side.steps[3].kept < 12
        entropies = [step.entropy for step in side.steps]
        assert entropies == sorted(entropies, reverse=True)
        best, second = side.candidates[:2]
        assert side.greedy == best.token.id and len(side.candidates) == 30
        ratio = best.probability / second.probability
        assert best.after["temperature"] / second.after["temperature"] == pytest.approx(
            ratio**2, rel=0.01
        )
        for name, kept in (("top_k", 12), ("top_p", side.steps[3].kept)):
            shown = [candidate.after[name] for candidate in side.candidates]
            assert sum(value > 0 for value in shown) == kept and not any(shown[kept:])
            assert sum(shown) == pytest.approx(1, abs=0.01)
        assert side.shown == pytest.approx(sum(c.probability for c in side.candidates), abs=0.01)


def test_token_that_a_penalty_puts_first_is_shown(llama: ChatSession) -> None:
    before, after = torch.zeros(2, 259)
    before[5], before[6], after[7], after[8] = 9.0, 8.0, 9.0, 8.0
    side = _next_token(llama.tokenizer, [("model", before), ("repetition_penalty", after)], 2)
    assert [candidate.token.id for candidate in side.candidates] == [5, 6, 7, 8]
    assert side.greedy == 7
    cut = torch.full((259,), -torch.inf)
    cut[258] = 1.0
    side = _next_token(llama.tokenizer, [("model", before), ("top_k", cut)], 3)
    assert [candidate.token.id for candidate in side.candidates][3:] == [258], "no cut token"


def test_text_without_the_template_is_continued(adapted: ChatSession) -> None:
    view = view_next_token(adapted, "abc", reply="d", use_template=False)
    assert [token.text for token in view.tokens] == ["a", "b", "c", "d"]
    reply = view_next_token(adapted, "abc", reply="好").tokens
    assert [token.bytes for token in reply[-3:]] == ["e5", "a5", "bd"]
    with pytest.raises(UserError, match="The text is empty"):
        view_next_token(adapted, "", use_template=False)
    with pytest.raises(UserError, match="2,048 at most"):
        view_next_token(adapted, "a" * 3000)


# --- a reply, token by token --------------------------------------------------------------------


def test_reply_is_predicted_token_by_token(adapted: ChatSession) -> None:
    view = view_reply(adapted, "你好", "好的。", top=3)
    messages = [*adapted.messages("你好"), {"role": "assistant", "content": "好的。"}]
    ids = encode(adapted.tokenizer, messages).ids  # type: ignore[arg-type]
    start = len(view.prompt)
    assert [token.id for token in view.prompt] == ids[:start] == prompt_of(adapted, "你好")
    reply = [step.token.id for step in view.steps]
    assert reply == ids[start : start + len(reply)] and view.steps[-1].token.text == "<|im_end|>"
    whole = each_side(adapted, lambda: adapted.model(torch.tensor([ids])).logits[0].log_softmax(-1))
    for index, step in enumerate(view.steps):
        own = {side: each[start + index - 1].double() for side, each in whole.items()}
        for side, log_probs in own.items():
            expected = log_probs[step.token.id].exp()
            assert step.sides[side].probability == pytest.approx(float(expected), rel=1e-3)
            assert step.sides[side].rank == int((log_probs > log_probs[step.token.id]).sum()) + 1
            top = [candidate.token.id for candidate in step.sides[side].top]
            assert top == log_probs.topk(3).indices.tolist()
        p, q = own["adapter"].exp(), own["base"].exp()
        mean = (p + q) / 2
        js = ((p * (p / mean).log2()).sum() + (q * (q / mean).log2()).sum()) / 2
        assert step.jensen_shannon == pytest.approx(float(js), rel=1e-2, abs=1e-5)
        kl = (p * (p / q).log2()).sum()
        assert step.kullback_leibler == pytest.approx(float(kl), rel=1e-2, abs=1e-5)
    order = [view.steps[index].jensen_shannon for index in view.most_different]
    assert order == sorted(order, reverse=True) and len(order) == len(view.steps)  # type: ignore[type-var]
    nats = -sum(whole["base"][start + i - 1, token] for i, token in enumerate(reply))
    assert view.nats["base"] == pytest.approx(float(nats), rel=1e-3)


@pytest.mark.parametrize("question", ["你好", "1+1"])
def test_reply_without_text_is_the_greedy_one_of_the_adapter(
    adapted: ChatSession, question: str
) -> None:
    view = view_reply(adapted, question, max_new_tokens=9)
    assert len(view.steps) == 9
    assert [step.sides["adapter"].rank for step in view.steps] == [1] * 9
    assert [step.sides["base"].rank for step in view.steps] != [1] * 9
    assert len(view_reply(adapted, question, max_new_tokens=-1).steps) == 1
    short = replace(adapted, context_length=len(view.prompt) + 5)
    assert len(view_reply(short, question, max_new_tokens=5).steps) == 5
    with pytest.raises(UserError, match="this view shows"):
        view_reply(short, question, max_new_tokens=6)


def test_greedy_reply_ends_with_its_end_token(
    adapted: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = view_reply(adapted, "你好", max_new_tokens=9).steps[2].token.id
    monkeypatch.setattr(adapted.model.generation_config, "eos_token_id", [third])
    view = view_reply(adapted, "你好", max_new_tokens=9)
    assert view.steps[-1].token.id == third and len(view.steps) <= 3


def test_reply_of_a_base_has_no_divergence_and_long_ones_are_refused(llama: ChatSession) -> None:
    view = view_reply(llama, "你好", "好")
    assert list(view.steps[0].sides) == ["base"] and view.steps[0].jensen_shannon is None
    assert view.most_different == []
    with pytest.raises(UserError, match="The reply has 201 tokens, and this view shows 128"):
        view_reply(llama, "a", "b" * 200)
