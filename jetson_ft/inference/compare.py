"""Base and adapter on the same held-out rows: loss, replies, probes, and what differs clearly."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jetson_ft.data.chat_template import encode_prompt, prompt_and_reference, until_last_trained
from jetson_ft.data.formats import TEXT
from jetson_ft.inference import metrics
from jetson_ft.inference.generate import Reply
from jetson_ft.inference.probes import answer_probes, summarize_probes
from jetson_ft.inference.reader import ModelReader, Reader

ProgressCallback = Callable[[str, str, int, int], None]  # (side, part, done, total)


def adapter_sides(reader: ModelReader) -> dict[str, Reader]:
    """Return both sides of a PEFT model: its adapter disabled, and enabled."""
    return {"before": replace(reader, is_base=True), "after": reader}


def compare_adapter(
    sides: Mapping[str, Reader],
    tokenizer: Any,
    conversations: Sequence[dict[str, Any]],
    encoded: Sequence[dict[str, Any]],
    max_new_tokens: int,
    samples: int,
    progress: ProgressCallback,
    max_length: int,
) -> dict[str, Any]:
    """Measure a base ("before") and its adapter ("after") on the same rows, or one model alone.

    Args:
        sides: `adapter_sides`, or "before" alone.
        conversations: held-out rows (row, messages, perhaps tools and category); the last answer
            that is trained on and begins within `max_length` is the reference, of a document the
            text after its beginning.
        encoded: the same rows as tokens (`data.tokenize`); a document may have several pieces.
        samples: rows whose replies are part of the result.
        progress: called with a side, "tokens", "replies" or "probes", done, total: first for the
            loss of the rows' tokens, then for the replies, then for the probes; each part begins
            at 0 done.
        max_length: tokens at which training truncates rows.

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
    result: dict[str, Any] = {"rows": len(rows), "documents": documents}
    generation: dict[str, Any] = {"method": "greedy", "max_new_tokens": max_new_tokens}
    started, statistics, answers = time.monotonic(), {}, {}
    for side, reader in sides.items():
        report = partial(progress, side)
        nats, tokens = reader.score(encoded, partial(report, "tokens"))
        replying = time.monotonic()
        replies = reader.reply(prompts, max_new_tokens, partial(report, "replies"))
        generation[side] = _speed(replies, time.monotonic() - replying)
        answers[side] = answer_probes(reader, tokenizer, partial(report, "probes"))
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
    result["categories"] = metrics.by_category(rows, list(sides))
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
