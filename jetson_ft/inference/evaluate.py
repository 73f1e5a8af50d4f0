"""Before and after: the base and the adapter on the same held-out rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from jetson_ft.data.formats import Message
from jetson_ft.data.template import encode_prompt, end_ids
from jetson_ft.inference.generate import Reply, reply_all
from jetson_ft.inference.metrics import reply_figures
from jetson_ft.models import attention
from jetson_ft.models.loss import Score, score, without_head
from jetson_ft.models.packing import Pack

Messages = list[Message]
Listener = Callable[[str, str, int, int], None]
_Tell = Callable[[str, int, int], None]  # the same, of one side


def compare(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Messages],
    packs: Sequence[Pack],
    characters: int,
    max_new_tokens: int,
    samples: int,
    progress: Listener = lambda side, part, done, of: None,
    scores: dict[str, Score] | None = None,
) -> dict[str, Any]:
    """Measures a PEFT model with its adapter switched off ("before") and on ("after").

    Args:
        conversations: held-out rows; the last turn is the answer to be matched.
        packs: the same rows as tokens.
        characters: of all their answers.
        progress: hears ("before"|"after", "tokens"|"replies", done, of), at first of none: the
            rows' tokens are measured, then replies to them written.
        scores: by side, where training has measured these very weights on these rows already.

    Returns:
        `report.json`'s `eval` and, under "generation", how the replies were written.
    """
    prompts = [encode_prompt(tokenizer, messages[:-1]) for messages in conversations]
    references = [messages[-1]["content"] for messages in conversations]
    ends = end_ids(tokenizer, model)
    result: dict[str, Any] = {"rows": len(conversations)}
    started = time.monotonic()
    for side in ("before", "after"):
        tell = partial(progress, side)
        with model.disable_adapter() if side == "before" else nullcontext():
            found = scores[side] if scores else _score(model, packs, characters, tell)
            tell("replies", 0, len(prompts))
            replies = reply_all(
                model, tokenizer, prompts, ends, max_new_tokens,
                lambda done, tell=tell: tell("replies", done, len(prompts)),  # type: ignore[misc]
            )  # fmt: skip
        figures = {"loss": found.loss, "bits_per_char": found.bits_per_char}
        figures |= reply_figures(replies, references)
        result[side] = figures | {"samples": _samples(conversations, replies, samples)}
    return {
        "eval": result,
        "generation": {
            "method": "greedy",
            "max_new_tokens": max_new_tokens,
            "seconds": round(time.monotonic() - started, 1),
        },
    }


def _score(model: Any, packs: Sequence[Pack], characters: int, tell: _Tell) -> Score:
    packing = any(len(pack.row_lengths) > 1 for pack in packs)
    with without_head(model), attention.packed(model) if packing else nullcontext():
        return score(model, _told(packs, tell), characters)


def _told(packs: Sequence[Pack], tell: _Tell) -> Iterator[Pack]:
    """The packs one by one; how many of their tokens are done is told before each, and at the end.

    Not rows, of which the first packs hold few long ones and the last many short ones.
    """
    done, of = 0, sum(pack.tokens for pack in packs)
    for pack in packs:
        tell("tokens", done, of)
        yield pack
        done += pack.tokens
    tell("tokens", done, of)


def _samples(
    conversations: Sequence[Messages], replies: Sequence[Reply], count: int
) -> list[dict[str, Any]]:
    """Evenly spread over the rows, the same rows for both sides."""
    if not count or not conversations:
        return []
    count = min(count, len(conversations))
    return [
        {
            "row": index,
            "messages": conversations[index][:-1],
            "reference": conversations[index][-1]["content"],
            "reply": replies[index].text,
            "ended": replies[index].ended,
        }
        for index in (number * len(conversations) // count for number in range(count))
    ]
