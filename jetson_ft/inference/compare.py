"""Base and adapter on the same held-out rows: loss, replies, probes, and what differs clearly."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from jetson_ft.data.chat_template import (
    encode_prompt,
    end_ids,
    prompt_and_reference,
    until_last_trained,
)
from jetson_ft.data.formats import TEXT
from jetson_ft.inference import metrics
from jetson_ft.inference.generate import MAX_REPLY_BATCH, Reply, generate_replies
from jetson_ft.inference.probes import answer_probes, summarize_probes
from jetson_ft.kernels import attention
from jetson_ft.kernels.lm_head_loss import chunked_lm_head, score_rows
from jetson_ft.kernels.packing import Pack, make_packs

ProgressCallback = Callable[[str, str, int, int], None]  # (side, part, done, total)
BOTH_SIDES = ("before", "after")


def compare_adapter(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[dict[str, Any]],
    encoded: Sequence[dict[str, Any]],
    pack_tokens: int,
    max_new_tokens: int,
    samples: int,
    progress: ProgressCallback,
    max_length: int,
    batch_size: Callable[[int], int] = lambda width: MAX_REPLY_BATCH,
    sides: Sequence[str] = BOTH_SIDES,
) -> dict[str, Any]:
    """Measure a PEFT model with its adapter disabled ("before") and enabled ("after").

    Args:
        conversations: held-out rows (row, messages, perhaps tools and category); the last answer
            that is trained on and begins within `max_length` is the reference, of a document the
            text after its beginning.
        encoded: the same rows as tokens (`data.tokenize`); a document may have several pieces.
        pack_tokens: tokens of a pack of rows; 0: rows can't be packed.
        samples: rows whose replies are part of the result.
        progress: called with a side, "tokens", "replies" or "probes", done, total: first for the
            loss of the rows' tokens, then for the replies, then for the probes; each part begins
            at 0 done.
        max_length: tokens at which training truncates rows.
        batch_size: as in `generate_replies`.
        sides: ("before",) for a model without an adapter.

    Returns:
        `report.json`'s `eval`; under "generation" how the replies were generated, and how fast;
        under "rows" those of heldout.json.
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
    rows: list[dict[str, Any]] = [
        {
            "sha256": _messages_sha256(row["messages"]), "category": row.get("category") or "",
            "characters": 0, "tokens": 0, "reference": reference,
        }
        for row, reference in zip(conversations, references, strict=True)
    ]  # fmt: skip
    numbers = {row["row"]: index for index, row in enumerate(conversations)}
    owners = [numbers[piece["row"]] for piece in encoded]  # the row of each piece
    for owner, piece in zip(owners, encoded, strict=True):
        rows[owner]["characters"] += piece["answer_characters"]
    packs = list(make_packs(list(encoded), pack_tokens))
    result: dict[str, Any] = {"rows": len(rows), "documents": documents}
    generation: dict[str, Any] = {"method": "greedy", "max_new_tokens": max_new_tokens}
    started, statistics, answers = time.monotonic(), {}, {}
    for side in sides:
        report = partial(progress, side)
        has_adapter = len(sides) == 2
        with model.disable_adapter() if has_adapter and side == "before" else nullcontext():
            nats, tokens = _measure_loss(model, packs, len(owners), partial(report, "tokens"))
            replying = time.monotonic()
            replies = generate_replies(
                model, tokenizer, prompts, eos_ids, max_new_tokens, partial(report, "replies"),
                batch_size,
            )  # fmt: skip
            generation[side] = _speed(replies, time.monotonic() - replying)
            answers[side] = answer_probes(
                model, tokenizer, eos_ids, pack_tokens > 0, partial(report, "probes"), batch_size
            )
        for row, reply in zip(rows, replies, strict=True):
            row["tokens"] = 0
            row[side] = {"nats": 0.0, "reply": reply.text, "ended": reply.ended}
        for owner, piece_nats, piece_tokens in zip(owners, nats, tokens, strict=True):
            rows[owner]["tokens"] += piece_tokens
            rows[owner][side]["nats"] += piece_nats
        statistics[side] = metrics.row_statistics(rows, side)
        texts = [reply.text for reply in replies]
        result[side] = {
            **metrics.figures(statistics[side]),
            "distinct_1": metrics.distinct(texts, 1),
            "distinct_2": metrics.distinct(texts, 2),
            "samples": _select_samples(shown, references, replies, samples),
        }
    if len(sides) == 2:
        result["differences"] = metrics.differences(*statistics.values())
    result["categories"] = metrics.by_category(rows, sides)
    if all(answers.values()):  # none for a model that reads very few tokens
        result["probes"] = summarize_probes(answers)
    generation["seconds"] = round(time.monotonic() - started, 1)
    return {"eval": result, "generation": generation, "rows": rows}


def _messages_sha256(messages: Sequence[dict[str, Any]]) -> str:
    texts = [[m["role"], m["content"], m.get("tool_calls") or ""] for m in messages]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


def _speed(replies: Sequence[Reply], seconds: float) -> dict[str, float]:
    """Return the speed of the replies of one side, which are generated in batches."""
    tokens = sum(reply.tokens for reply in replies)
    return {
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "seconds_per_reply": round(seconds / max(1, len(replies)), 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }


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
    model: Any, packs: Sequence[Pack], pieces: int, progress: Callable[[int, int], None]
) -> tuple[list[float], list[int]]:
    """Return the nats and the answer tokens of each piece."""

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
        return score_rows(model, with_progress(), pieces)


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
