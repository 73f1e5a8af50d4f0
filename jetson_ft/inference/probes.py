"""Probes of general knowledge and instruction following: what did a fine-tune forget?

The bundled probes are short questions in English and Chinese with a known answer. Most are multiple
choice: each choice is scored as the assistant's answer in the model's chat template, by its log
likelihood per UTF-8 byte (the `acc_norm` of EleutherAI's lm-evaluation-harness), and the model
answers the probe if the right choice has the highest. The others are generated greedily and
compared with a regular expression.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jetson_ft
from jetson_ft.data.chat_template import encode_all, encode_prompt
from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import UserError
from jetson_ft.inference.reader import Progress, Reader
from jetson_ft.inference.statistics import paired_difference

_FILE = Path(jetson_ft.__file__).parent / "data" / "bundled" / "probes.jsonl"
_REPLY_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """A question with its answer among other choices, or with a pattern of right replies."""

    id: str
    language: str  # en, zh
    topic: str
    question: str
    answer: str = ""
    others: tuple[str, ...] = ()
    pattern: str = ""  # searched in the reply without regard to case

    def choices(self) -> tuple[str, ...]:
        """Return the right answer, then the others."""
        return (self.answer, *self.others)


def load_probes() -> list[Probe]:
    """Return the bundled probes."""
    rows = map(json.loads, _FILE.read_text(encoding="utf-8").splitlines())
    return [Probe(**row | {"others": tuple(row.get("others", ()))}) for row in rows]


def answer_probes(
    reader: Reader, tokenizer: Any, progress: Progress = lambda done, total: None
) -> dict[str, bool]:
    """Return for each probe, by its id, whether the model answers it correctly.

    Probes that are longer than `reader.max_tokens` are left out.

    Args:
        progress: called with the probes done and their number.
    """
    limit = reader.max_tokens or sys.maxsize
    choice_probes, encoded = [], []
    for probe, rows in _encode_choices(tokenizer).items():
        if max(len(row["input_ids"]) for row in rows) <= limit:
            choice_probes.append(probe)
            encoded += rows
    choices = [choice for probe in choice_probes for choice in probe.choices()]
    reply_probes, prompts = [], []
    for probe in load_probes():
        if probe.pattern:
            prompt = encode_prompt(tokenizer, [_question(probe)])
            if len(prompt) + _REPLY_TOKENS <= limit:
                reply_probes.append(probe)
                prompts.append(prompt)
    count = len(choice_probes) + len(reply_probes)
    nats, _tokens = reader.score(
        encoded, lambda done, total: progress(len(choice_probes) * done // max(1, total), count)
    )
    losses = [value / len(text.encode()) for value, text in zip(nats, choices, strict=True)]
    correct, start = {}, 0
    for probe in choice_probes:
        own = losses[start : start + len(probe.choices())]
        start += len(own)
        correct[probe.id] = own[0] < min(own[1:])  # False for NaN
    replies = reader.reply(
        prompts, _REPLY_TOKENS, lambda done, _total: progress(len(choice_probes) + done, count)
    )
    for probe, reply in zip(reply_probes, replies, strict=True):
        correct[probe.id] = re.search(probe.pattern, reply.text, re.IGNORECASE) is not None
    return correct


def _encode_choices(tokenizer: Any) -> dict[Probe, list[dict[str, Any]]]:
    """Return ids and segments of a conversation for each choice of the multiple-choice probes."""
    probes = [probe for probe in load_probes() if not probe.pattern]
    conversations = [
        ([_question(probe), ChatMessage(role="assistant", content=choice)], "")
        for probe in probes
        for choice in probe.choices()
    ]
    rows = []
    for result in encode_all(tokenizer, conversations):
        if isinstance(result, UserError):
            raise result
        rows.append({"input_ids": result.ids, "segments": result.segments})
    remaining = iter(rows)
    return {probe: [next(remaining) for _choice in probe.choices()] for probe in probes}


def _question(probe: Probe) -> ChatMessage:
    return ChatMessage(role="user", content=probe.question)


def summarize_probes(sides: dict[str, dict[str, bool]]) -> dict[str, Any]:
    """Return `eval.probes` of report.json, from the answers of one or both sides."""
    result: dict[str, Any] = {"count": len(next(iter(sides.values())))}
    for side, answers in sides.items():
        right = [name for name, is_right in answers.items() if is_right]
        result[side] = {"correct": right, "share": len(right) / len(answers)}
    if len(sides) == 2:
        before, after = sides.values()
        difference = paired_difference(
            [[float(before[name]), 1.0] for name in before],
            [[float(after[name]), 1.0] for name in before],
        )
        result["lost"] = [name for name in before if before[name] and not after[name]]
        result["gained"] = [name for name in before if after[name] and not before[name]]
        result["difference"] = asdict(difference) if difference else None
    return result
