"""Check of an export by an independent reader: llama.cpp against transformers.

Three things are compared on held-out rows: the token ids of prompts, as a client of llama.cpp's
server gets them (chat template, start token); greedy replies (weights, end tokens); and bits per
character of the answers (docs/decisions/0023).
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jetson_ft.data.chat_template import encode_prompt, end_ids, until_last_trained
from jetson_ft.data.conversation import prepare_conversation
from jetson_ft.data.formats import TEXT
from jetson_ft.export.llama import LlamaServer, find_program
from jetson_ft.export.llama_reader import LlamaScorer, reader_name

Progress = Callable[[int, int], None]  # (rows done, rows in all)

PROMPTS = 20
ROWS = 200  # for the bits per character; evenly spread where there are more
REPLY_TOKENS = 48
# Largest difference of two logits that is called a near tie. llama.cpp multiplies f16 weights by
# activations that it rounds to f16, and its cache holds f16. Where transformers computes in 16 bits
# too (a GPU), its own logits have steps of an eighth.
NEAR_TIE, NEAR_TIE_16_BIT = 0.1, 0.5
# Most that bits per character may differ from transformers', as a share of them, by file type; and
# how much more where transformers computes in 16 bits (docs/decisions/0023).
BOUNDS = {
    "f16": 0.005, "lora": 0.005, "q8_0": 0.03, "q6_k": 0.03, "q5_k_m": 0.05, "q4_k_m": 0.1,
    "q4_0": 0.4,
}  # fmt: skip
BOUND_16_BIT = 0.01


@dataclass(frozen=True)
class ReferenceReply:
    """A prompt and the greedy reply of transformers to it."""

    messages: list[dict[str, str]]
    prompt: list[int]  # token ids
    ids: list[int]  # of the reply, without its end token
    gaps: list[float]  # difference of the two largest logits, by token of the reply, and its end
    text: str
    ended: bool


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the held-out rows."""

    replies: list[ReferenceReply]
    rows: list[dict[str, Any]]  # token ids and segments of the rows that are scored
    characters: int  # of their answers
    bits_per_char: float
    end_ids: list[int]
    precision: str  # of transformers' arithmetic
    seconds: float


def measure_reference(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Mapping[str, Any]],
    encoded: Sequence[Mapping[str, Any]],
    on_progress: Progress = lambda done, total: None,
) -> Reference:
    """Return replies and bits per character of a model in transformers.

    Args:
        model: the merged model, or base and adapter; in fp32 where that fits into memory.
        conversations: held-out rows (messages, tools).
        encoded: the same rows as token ids and segments.
    """
    from jetson_ft.kernels.lm_head_loss import chunked_lm_head, score_packs
    from jetson_ft.kernels.packing import pack_rows

    started = time.monotonic()
    ends = end_ids(tokenizer, model)
    prompts = _choose_prompts(tokenizer, conversations)
    numbers = _spread(len(encoded), ROWS)
    rows = [dict(encoded[number]) for number in numbers]
    total = len(prompts) + len(rows)
    replies: list[ReferenceReply] = []
    for messages, prompt in prompts:
        on_progress(len(replies), total)
        replies.append(_reference_reply(model, tokenizer, messages, prompt, ends))
    characters = sum(int(row["answer_characters"]) for row in rows)
    bits = 0.0
    with chunked_lm_head(model):
        for done, row in enumerate(rows):
            on_progress(len(prompts) + done, total)
            bits += score_packs(model, [pack_rows([row])], 1).bits_per_char
    on_progress(total, total)
    return Reference(
        replies, rows, characters, bits / max(1, characters), ends,
        str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        time.monotonic() - started,
    )  # fmt: skip


def check_file(
    reference: Reference,
    model: Path,
    file_type: str,
    lora: Path | None = None,
    threads: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Return `check.json` of a GGUF file.

    Args:
        model: the file; with `lora` that of the base.
        file_type: a key of `BOUNDS`.
        lora: the adapter's file.
        threads: of llama.cpp; None: `llama.default_threads`.

    Raises:
        UserError: llama.cpp can't read the file. A difference is no error: see `passed`.
    """
    started = time.monotonic()
    is_fp32 = reference.precision == "float32"
    near_tie = NEAR_TIE if is_fp32 else NEAR_TIE_16_BIT
    total = len(reference.replies) + len(reference.rows)
    longest = max((len(reply.prompt) for reply in reference.replies), default=0) + REPLY_TOKENS
    counts: collections.Counter[str] = collections.Counter()
    with LlamaServer(
        model, {"adapter": lora} if lora else None, n_ctx=longest + 8, threads=threads
    ) as server:
        reader = _describe_reader(server)
        for done, reply in enumerate(reference.replies):
            on_progress(done, total)
            counts += _compare_reply(server, reply, near_tie)
    nats, longest = 0.0, max((len(row["input_ids"]) for row in reference.rows), default=1)
    with LlamaScorer(model, lora, longest, threads) as scorer:
        are_ends = scorer.are_ends(reference.end_ids)
        unknown_ends = [
            token for token, is_end in zip(reference.end_ids, are_ends, strict=True) if not is_end
        ]
        for done, row in enumerate(reference.rows):
            on_progress(len(reference.replies) + done, total)
            nats += scorer.nats(row)[0]
    on_progress(total, total)
    bits = nats / math.log(2) / max(1, reference.characters)
    bound = BOUNDS[file_type] + (0 if is_fp32 else BOUND_16_BIT)
    is_near = abs(bits - reference.bits_per_char) <= bound * reference.bits_per_char
    is_exact = file_type in ("f16", "lora")
    prompts = len(reference.replies)
    return {
        "schema": 1,
        "reader": reader,
        "prompts": prompts,  # 0: no held-out row has one, and no text was compared
        "same_tokens": counts["same_tokens"],
        "same_text": counts["same_text"],
        "near_ties": counts["near_ties"],
        "near_tie_bound": near_tie,
        "reference": f"transformers {version('transformers')}, {reference.precision}",
        "unknown_end_tokens": unknown_ends,
        "heldout_rows": len(reference.rows),
        "bits_per_character": {"adapter": reference.bits_per_char, "export": bits},
        "bound": bound,
        "passed": (
            is_near
            and not unknown_ends
            and counts["same_tokens"] == prompts
            and (not is_exact or counts["same_text"] + counts["near_ties"] == prompts)
        ),
        "seconds": round(time.monotonic() - started + reference.seconds, 1),
    }


def _describe_reader(server: LlamaServer) -> str:
    """Return which builds of llama.cpp read the file: texts and scores may have two."""
    program = find_program()
    if program is None:
        return reader_name()
    build = server.request("/props").get("build_info", "of an unknown build")
    return f"{Path(program).name} {build} (texts), {reader_name()} (bits per character)"


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers below `count`, evenly spread."""
    most = min(count, most)
    return [number * count // most for number in range(most)]


def _choose_prompts(
    tokenizer: Any, conversations: Sequence[Mapping[str, Any]]
) -> list[tuple[list[dict[str, str]], list[int]]]:
    """Return the messages before the last answer of some rows, and their token ids.

    Left out are documents, rows with tools, and texts that spell out control tokens: a client of
    llama.cpp's server gets the tokens themselves for those.
    """
    prompts = []
    for number in _spread(len(conversations), 5 * PROMPTS):
        row = conversations[number]
        *before, _answer = until_last_trained(row["messages"])
        if not before or row.get("tools") or any(turn.get("tool_calls") for turn in before):
            continue
        if before[0]["role"] == TEXT or prepare_conversation(tokenizer, before, "").control_texts:
            continue
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in before]
        prompts.append((messages, encode_prompt(tokenizer, before)))
    return [prompts[number] for number in _spread(len(prompts), PROMPTS)]


def _reference_reply(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], prompt: list[int], ends: list[int]
) -> ReferenceReply:
    import torch

    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=REPLY_TOKENS,
            do_sample=False, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    reply = output.sequences[0, len(prompt) :].tolist()
    gaps = []
    for logits in output.logits:
        largest, second = logits[0].float().topk(2).values.tolist()
        gaps.append(largest - second)
    ended = reply[-1] in ends
    reply = reply[:-1] if ended else reply
    return ReferenceReply(messages, prompt, reply, gaps, _text(tokenizer.decode(reply)), ended)


def _compare_reply(
    server: LlamaServer, reply: ReferenceReply, near_tie: float
) -> collections.Counter[str]:
    """Return which of `same_tokens`, `same_text` and `near_ties` count for a prompt."""
    counts: collections.Counter[str] = collections.Counter()
    adapters = [{"id": number, "scale": 1.0} for number in server.lora_ids.values()]
    options = {
        "temperature": 0.0, "repeat_penalty": 1.0, "cache_prompt": False,
        "n_predict": REPLY_TOKENS, "max_tokens": REPLY_TOKENS, "lora": adapters,
    }  # fmt: skip
    chat = {"messages": reply.messages}
    text = server.request("/apply-template", chat)["prompt"]
    tokenized = {"content": text, "add_special": True, "parse_special": True}
    counts["same_tokens"] = server.request("/tokenize", tokenized)["tokens"] == reply.prompt
    answer = server.request("/v1/chat/completions", {**chat, **options})
    choice = answer["choices"][0]
    ended = choice["finish_reason"] == "stop"
    counts["same_tokens"] &= answer["usage"]["prompt_tokens"] == len(reply.prompt)
    counts["same_text"] = _text(choice["message"]["content"] or "") == reply.text
    counts["same_text"] &= ended == reply.ended
    if not counts["same_text"]:
        # The text alone doesn't show at which token the replies part.
        request = {"prompt": reply.prompt, "return_tokens": True, **options}
        tokens = server.request("/completion", request)["tokens"]
        pairs = zip(tokens, reply.ids, strict=False)
        parting = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if parting is None:
            parting = min(len(tokens), len(reply.ids))
        counts["near_ties"] = parting < len(reply.gaps) and reply.gaps[parting] <= near_tie
    return counts


def _text(text: str) -> str:
    """Return a reply without a last character that the length limit cut in half."""
    return text.rstrip("\ufffd").strip()
