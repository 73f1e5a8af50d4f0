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
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jetson_ft
from jetson_ft.data.chat_template import encode_all, encode_prompt
from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import MAX_REPLY_BATCH, generate_replies
from jetson_ft.inference.statistics import paired_difference
from jetson_ft.kernels import attention
from jetson_ft.kernels.lm_head_loss import chunked_lm_head, score_rows
from jetson_ft.kernels.packing import Pack, make_packs

_FILE = Path(jetson_ft.__file__).parent / "data" / "bundled" / "probes.jsonl"
_REPLY_TOKENS = 16
_PACK_TOKENS = 1024


@dataclass(frozen=True)
class Probe:
    """A question with its answer among other choices, or with a pattern of right replies."""

    id: str
    language: str  # en, zh
    topic: str
    question: str
    answer: str = ""
    others: Sequence[str] = ()
    pattern: str = ""  # searched in the reply without regard to case


def load_probes() -> list[Probe]:
    """Return the bundled probes."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return [Probe(**json.loads(line)) for line in lines]


def answer_probes(
    model: Any,
    tokenizer: Any,
    eos_ids: Sequence[int],
    packing: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch_size: Callable[[int], int] = lambda width: MAX_REPLY_BATCH,
) -> dict[str, bool]:
    """Return for each probe, by its id, whether the model answers it correctly.

    Args:
        packing: whether several rows can be computed at once.
        progress: called with the probes done and their number.
        batch_size: as in `generate_replies`.
    """
    probes = load_probes()
    choice_probes = [probe for probe in probes if not probe.pattern]
    reply_probes = [probe for probe in probes if probe.pattern]
    choices = [choice for probe in choice_probes for choice in (probe.answer, *probe.others)]
    conversations = [
        ([_question(probe), ChatMessage(role="assistant", content=choice)], "")
        for probe in choice_probes
        for choice in (probe.answer, *probe.others)
    ]
    encoded = []
    for result in encode_all(tokenizer, conversations):
        if isinstance(result, UserError):
            raise result
        encoded.append({"input_ids": result.ids, "segments": result.segments})

    def with_progress() -> Iterator[Pack]:
        packs = list(make_packs(encoded, _PACK_TOKENS if packing else 0))
        for number, pack in enumerate(packs):
            progress(len(choice_probes) * number // len(packs), len(probes))
            yield pack

    attention_mode = attention.use_packed_attention(model) if packing else nullcontext()
    with chunked_lm_head(model), attention_mode:
        nats, _tokens = score_rows(model, with_progress(), len(choices))
    losses = [value / len(text.encode()) for value, text in zip(nats, choices, strict=True)]
    correct, start = {}, 0
    for probe in choice_probes:
        own = losses[start : start + 1 + len(probe.others)]
        start += len(own)
        correct[probe.id] = own[0] < min(own[1:])  # False for NaN
    prompts = [encode_prompt(tokenizer, [_question(probe)]) for probe in reply_probes]
    replies = generate_replies(
        model, tokenizer, prompts, eos_ids, _REPLY_TOKENS,
        lambda done, _total: progress(len(choice_probes) + done, len(probes)), batch_size,
    )  # fmt: skip
    for probe, reply in zip(reply_probes, replies, strict=True):
        correct[probe.id] = re.search(probe.pattern, reply.text, re.IGNORECASE) is not None
    return correct


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
