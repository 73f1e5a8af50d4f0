"""Base and adapter on the same held-out rows: loss, replies, and metrics of the replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

from jetson_ft.data.chat_template import (
    encode_prompt,
    end_ids,
    prompt_and_reference,
    until_last_trained,
)
from jetson_ft.data.formats import TEXT
from jetson_ft.inference.generate import MAX_REPLY_BATCH, Reply, generate_replies
from jetson_ft.inference.metrics import reply_metrics
from jetson_ft.kernels import attention
from jetson_ft.kernels.lm_head_loss import Score, chunked_lm_head, score_packs
from jetson_ft.kernels.packing import Pack

ProgressCallback = Callable[[str, str, int, int], None]  # (side, part, done, total)


def compare_adapter(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[dict[str, Any]],
    packs: Sequence[Pack],
    characters: int,
    max_new_tokens: int,
    samples: int,
    progress: ProgressCallback,
    max_length: int,
    batch_size: Callable[[int], int] = lambda width: MAX_REPLY_BATCH,
    scores: dict[str, Score] | None = None,
) -> dict[str, Any]:
    """Measure a PEFT model with its adapter disabled ("before") and enabled ("after").

    Args:
        conversations: held-out rows (messages, perhaps tools); the last answer that is trained on
            and begins within `max_length` is the reference, of a document the text after its
            beginning.
        packs: the same rows as tokens.
        characters: of all reference answers.
        samples: rows whose replies are part of the result.
        progress: called with ("before" or "after", "tokens" or "replies", done, total), first
            for the loss of the rows' tokens, then for the replies; each part begins at 0 done.
        max_length: tokens at which training truncates rows.
        batch_size: as in `generate_replies`.
        scores: by side, where training has measured these weights on these rows already.

    Returns:
        `report.json`'s `eval` and, under "generation", how the replies were generated.
    """
    cut = [_cut_turns(tokenizer, row, max_length) for row in conversations]
    conversations = [row for row, _prompt in cut]
    pairs = [
        prompt_and_reference(
            tokenizer, row["messages"], row.get("tools") or "", max_new_tokens, prompt
        )
        for row, prompt in cut
    ]
    prompts, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    eos_ids = end_ids(tokenizer, model)
    documents, shown = 0, list(conversations)
    for index, (row, (prompt, reference)) in enumerate(zip(conversations, pairs, strict=True)):
        if row["messages"][0]["role"] == TEXT:
            documents += 1
            beginning = tokenizer.decode(prompt, skip_special_tokens=True)
            shown[index] = {
                "messages": [
                    {"role": TEXT, "content": beginning},
                    {"role": "assistant", "content": reference},
                ]
            }
    result: dict[str, Any] = {"rows": len(conversations), "documents": documents}
    started = time.monotonic()
    for side in ("before", "after"):
        report = partial(progress, side)
        with model.disable_adapter() if side == "before" else nullcontext():
            if scores:
                score = scores[side]
            else:
                score = _measure_loss(model, packs, characters, partial(report, "tokens"))
            replies = generate_replies(
                model, tokenizer, prompts, eos_ids, max_new_tokens, partial(report, "replies"),
                batch_size,
            )  # fmt: skip
        result[side] = {
            **asdict(score),
            **reply_metrics(replies, references),
            "samples": _select_samples(shown, references, replies, samples),
        }
    seconds = round(time.monotonic() - started, 1)
    generation = {"method": "greedy", "max_new_tokens": max_new_tokens, "seconds": seconds}
    return {"eval": result, "generation": generation}


def _cut_turns(
    tokenizer: Any, row: dict[str, Any], max_length: int
) -> tuple[dict[str, Any], list[int] | None]:
    """Return the row up to the last answer, trained on, that begins within `max_length` tokens.

    Training has truncated the row there, so that later turns are no part of it. The second value
    has the ids before that answer; None for a document.
    """
    if row["messages"][0]["role"] == TEXT:
        return row, None
    messages, tools = until_last_trained(row["messages"]), row.get("tools") or ""
    while len(prompt := encode_prompt(tokenizer, messages[:-1], tools)) >= max_length:
        earlier = until_last_trained(messages[:-1])
        if len(earlier) == len(messages) - 1:  # there is none
            break
        messages = earlier
    return {**row, "messages": messages}, prompt


def _measure_loss(
    model: Any, packs: Sequence[Pack], characters: int, progress: Callable[[int, int], None]
) -> Score:
    def with_progress() -> Iterator[Pack]:
        # In tokens, because the first packs hold few long rows and the last ones many short rows.
        done, total = 0, sum(pack.tokens for pack in packs)
        for pack in packs:
            progress(done, total)
            yield pack
            done += pack.tokens
        progress(done, total)

    packed = any(len(pack.row_lengths) > 1 for pack in packs)
    attention_mode = attention.use_packed_attention(model) if packed else nullcontext()
    with chunked_lm_head(model), attention_mode:
        return score_packs(model, with_progress(), characters)


def _select_samples(
    conversations: Sequence[dict[str, Any]],
    references: list[str],
    replies: Sequence[Reply],
    count: int,
) -> list[dict[str, Any]]:
    """Return evenly spaced rows with their replies; the same rows for both sides."""
    count = min(count, len(conversations))
    samples = []
    for row in (number * len(conversations) // count for number in range(count)):
        messages = [
            {"role": message["role"], "content": message["content"] or message.get("tool_calls")}
            for message in until_last_trained(conversations[row]["messages"])[:-1]
        ]
        sample = {"row": row, "messages": messages, "reference": references[row]}
        samples.append(sample | {"reply": replies[row].text, "ended": replies[row].ended})
    return samples
