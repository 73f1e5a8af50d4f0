"""Zero-, one- and few-shot prompts: the same replies and likelihoods as one at a time."""

from __future__ import annotations

import math

import pytest
import torch

from jetson_ft.chat.session import ChatSession
from jetson_ft.data.chat_template import encode_prompt, end_ids
from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import generate_replies
from jetson_ft.inside.in_context import view_in_context

EXAMPLES = [("1+1", "2。"), ("2+2", "4。"), ("3+3", "6。")]


def messages_of(count: int, system: str = "") -> list[ChatMessage]:
    pairs = [
        ChatMessage(role=role, content=text)  # type: ignore[typeddict-item]
        for pair in EXAMPLES[:count]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    first = [ChatMessage(role="system", content=system)] if system else []
    return [*first, *pairs, ChatMessage(role="user", content="4+4")]


def test_replies_and_likelihoods_are_those_of_each_prompt_alone(adapted: ChatSession) -> None:
    view = view_in_context(adapted, "4+4", EXAMPLES, answer="8。", system="s", max_new_tokens=6)
    assert list(view.sides) == ["base", "adapter"]
    assert [shot.examples for shot in view.sides["base"]] == [0, 1, 3]
    ends = end_ids(adapted.tokenizer, adapted.model)
    for shot in view.sides["adapter"]:
        prompt = encode_prompt(adapted.tokenizer, messages_of(shot.examples, "s"))
        (reply,) = generate_replies(adapted.model, adapted.tokenizer, [prompt], ends, 6)
        assert (shot.reply, shot.ended) == (reply.text, reply.ended)
        assert shot.prompt_tokens == len(prompt)
        answer = adapted.tokenizer("8。", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = adapted.model(torch.tensor([[*prompt, *answer]])).logits[0]
        log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        nats = -sum(float(log_probs[i, token]) for i, token in enumerate(answer))
        assert shot.answer_tokens == len(answer) == 4
        assert shot.nats == pytest.approx(nats, rel=1e-3)
        assert shot.bits_per_character == pytest.approx(nats / math.log(2) / 2, rel=1e-3)
        assert shot.probability == pytest.approx(math.exp(-nats / 4), abs=1e-3)
    assert view.sides["base"] != view.sides["adapter"]


@pytest.mark.parametrize(("count", "shots"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])])
def test_shots_are_none_one_and_all(llama: ChatSession, count: int, shots: list[int]) -> None:
    view = view_in_context(llama, "4+4", EXAMPLES[:count], max_new_tokens=2)
    assert [shot.examples for shot in view.sides["base"]] == shots
    assert view.answer is None and view.sides["base"][0].nats is None


def test_prompts_beyond_the_context_are_refused(llama: ChatSession) -> None:
    short = ChatSession(llama.model, llama.tokenizer, False, 100)
    assert view_in_context(short, "4+4", [], max_new_tokens=40)
    with pytest.raises(UserError, match="this view shows 60 at most"):
        view_in_context(short, "4+4", EXAMPLES, max_new_tokens=40)
