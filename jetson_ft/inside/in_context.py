"""Zero-, one- and few-shot prompts of the same question, for the base and for the adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jetson_ft.data.chat_template import ANSWER, encode_prompt, end_ids
from jetson_ft.data.formats import ChatMessage
from jetson_ft.inference.generate import generate_replies
from jetson_ft.inside.model import (
    DECIMALS,
    LoadedModel,
    View,
    answered,
    check_ids,
    clean,
    conversation,
    each_side,
    logits_at,
)

MAX_TOKENS = 2048  # of a prompt
MAX_REPLY = 128  # tokens


@dataclass(frozen=True)
class Shot(View):
    """The reply to one prompt, and how likely the given answer is after it."""

    examples: int  # questions with answers before the question
    prompt_tokens: int
    reply: str
    ended: bool  # by an end token, not by the length limit
    # Of the given answer; None without one. Probability is the mean over its tokens (geometric).
    nats: float | None = None
    answer_tokens: int | None = None
    bits_per_character: float | None = None
    probability: float | None = None


@dataclass(frozen=True)
class InContextView(View):
    """Replies to the same question with more and more examples before it, by side."""

    question: str
    answer: str | None
    sides: dict[str, list[Shot]]


def view_in_context(
    loaded: LoadedModel,
    text: str,
    examples: Sequence[tuple[str, str]],
    answer: str | None = None,
    system: str = "",
    max_new_tokens: int = 12,
) -> InContextView:
    """Return greedy replies to a question with no, one, and all examples before it.

    Args:
        examples: questions with their answers.
        answer: a right answer, whose likelihood is shown.
        max_new_tokens: longest reply.

    Raises:
        UserError: a prompt is too long, or the chat template refuses it.
    """
    *before, question = conversation(text, system)
    shown: list[ChatMessage] = []
    for asked, replied in examples:
        # Not trained on: the likelihood is of the last answer alone.
        reply = ChatMessage(role="assistant", content=clean(replied), train=False)
        shown += [ChatMessage(role="user", content=clean(asked)), reply]
    counts = sorted({0, min(1, len(examples)), len(examples)})
    prompts = [[*before, *shown[: 2 * count], question] for count in counts]
    ids = [encode_prompt(loaded.tokenizer, messages) for messages in prompts]
    limit = max(1, min(max_new_tokens, MAX_REPLY))
    for prompt in ids:
        check_ids(loaded, prompt, min(MAX_TOKENS, loaded.context_length - limit))
    answers = [answered(loaded, each, answer, MAX_TOKENS) for each in prompts] if answer else []
    ends = end_ids(loaded.tokenizer, loaded.model)

    def likelihood(index: int) -> dict[str, Any]:
        encoded = answers[index]
        places = [i for i, role in enumerate(encoded.segments) if role == ANSWER]
        nats = _nats(loaded, encoded.ids, places)
        return {
            "nats": round(nats, DECIMALS),
            "answer_tokens": len(places),
            "bits_per_character": round(nats / math.log(2) / max(1, encoded.characters), DECIMALS),
            "probability": round(math.exp(-nats / max(1, len(places))), DECIMALS),
        }

    def compute() -> list[Shot]:
        replies = generate_replies(loaded.model, loaded.tokenizer, ids, ends, limit)
        shots = []
        for index, reply in enumerate(replies):
            shot = Shot(counts[index], len(ids[index]), reply.text, reply.ended)
            shots.append(replace(shot, **likelihood(index)) if answer else shot)
        return shots

    return InContextView(text, answer, each_side(loaded, compute))


def _nats(loaded: LoadedModel, ids: Sequence[int], places: Sequence[int]) -> float:
    """Return the negative log-likelihood of the tokens at these places."""
    import torch

    logits = logits_at(loaded.model, ids, [place - 1 for place in places]).float()
    chosen = torch.tensor([ids[place] for place in places], device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, chosen, reduction="sum"))
