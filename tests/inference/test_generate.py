"""Replies are the same alone, in a batch and as a stream; and they end where they should."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.errors import UserError
from jetson_ft.inference.generate import (
    Reply,
    Sampling,
    _finish,
    _whole_characters,
    batches,
    reply_all,
    stream,
)

TEXTS = ["你好", "第1题：3加4等于几？", "a", "hello there, who are you and what can you do?", "b b"]


def write(writer: Any, texts: list[str], limit: int = 24, **options: Any) -> list[Reply]:
    prompts = [writer.prompt(text) for text in texts]
    return reply_all(writer.model, writer.tokenizer, prompts, writer.ends, limit, **options)


def streamed(writer: Any, text: str, sampling: Sampling, ends: list[int] | None = None) -> str:
    pieces = stream(
        writer.model, writer.tokenizer, writer.prompt(text), ends or writer.ends, sampling
    )
    return "".join(pieces)


def test_a_batch_says_what_single_replies_say(writer: Any) -> None:
    batch = write(writer, TEXTS)
    assert batch == [write(writer, [text])[0] for text in TEXTS]
    assert len({reply.text for reply in batch}) > 2


def test_order_and_progress_survive_sorting_by_length(writer: Any) -> None:
    heard: list[int] = []
    replies = write(writer, TEXTS, 8, progress=heard.append, batch_size=2)
    assert replies == write(writer, TEXTS, 8)
    assert heard == sorted(heard) and heard[-1] == 5 and len(heard) > 2


def test_no_prompts_no_replies(writer: Any) -> None:
    assert write(writer, []) == []


@pytest.mark.parametrize("limit", range(1, 14))
def test_a_stream_says_what_a_batch_says(writer: Any, limit: int) -> None:
    """At every length, so that some of the limits cut a character in half."""
    for text in TEXTS[:2]:
        whole = streamed(writer, text, Sampling(max_new_tokens=limit))
        assert whole.strip() == write(writer, [text], limit)[0].text
        assert not whole.endswith("\ufffd")


def test_a_reply_ends_before_its_first_end_token(writer: Any) -> None:
    free = write(writer, ["你好"], 30)[0]
    ids = writer.tokenizer(free.text, add_special_tokens=False)["input_ids"]
    stopper = ids[-1]
    prompts = [writer.prompt("你好")]
    ended = reply_all(writer.model, writer.tokenizer, prompts, [stopper], 30)[0]
    assert ended.ended and not free.ended
    assert ended.tokens < free.tokens
    assert free.text.startswith(ended.text)


def ids_of(writer: Any, text: str) -> list[int]:
    return list(writer.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "cut", "reply"),
    [
        ("你好", 0, Reply("你好", 6, False)),
        ("你好", 1, Reply("你", 5, False)),
        ("你好", 2, Reply("你", 4, False)),
        (" 你 ", 0, Reply("你", 5, False)),
        ("你<|endoftext|>好", 0, Reply("你", 4, True)),
        ("<|endoftext|>", 0, Reply("", 1, True)),
    ],
)
def test_finishing(writer: Any, text: str, cut: int, reply: Reply) -> None:
    ids = ids_of(writer, text)
    assert _finish(writer.tokenizer, ids[: len(ids) - cut], writer.ends) == reply


@given(st.lists(st.text(alphabet="ab\ufffd", max_size=4)))
def test_only_a_trailing_half_character_is_held_back(pieces: list[str]) -> None:
    assert "".join(_whole_characters(pieces)) == "".join(pieces).rstrip("\ufffd")
    assert all(_whole_characters(pieces))


# --- sampling ----------------------------------------------------------------------------


def test_sampling_repeats_with_a_seed_and_differs_without(writer: Any) -> None:
    warm = Sampling(max_new_tokens=20, temperature=1.5, seed=4)
    first = streamed(writer, "你好", warm)
    assert streamed(writer, "你好", warm) == first
    assert streamed(writer, "你好", replace(warm, seed=5)) != first


def test_the_likeliest_alone_is_greedy(writer: Any) -> None:
    greedy = streamed(writer, "你好", Sampling(max_new_tokens=12))
    assert streamed(writer, "你好", Sampling(12, temperature=2.0, top_k=1)) == greedy
    assert streamed(writer, "你好", Sampling(12, temperature=0.7, top_p=1e-6)) == greedy


def test_a_penalty_discourages_repeats(writer: Any) -> None:
    def distinct(penalty: float) -> int:
        return len(set(streamed(writer, "你好", Sampling(60, repetition_penalty=penalty))))

    assert distinct(2.0) > distinct(1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens can't be 0"),
        ({"temperature": -0.1}, "temperature can't be -0.1"),
        ({"temperature": float("nan")}, "temperature can't be nan"),
        ({"top_p": 0.0}, "top_p can't be 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Sampling(**values)
    assert caught.value.fix.startswith("From ")


# --- stopping ----------------------------------------------------------------------------


def begun(writer: Any, stopped: Any = lambda: False) -> Iterator[str]:
    """A long stream that no token of the model ends."""
    sampling = Sampling(max_new_tokens=1900)
    return stream(writer.model, writer.tokenizer, writer.prompt("你好"), [0], sampling, stopped)


def test_a_stream_ends_soon_after_it_is_asked_to(writer: Any) -> None:
    asked = iter(range(1000))
    started = time.monotonic()
    text = "".join(begun(writer, lambda: next(asked) >= 10))
    assert 0 < len(ids_of(writer, text)) < 40
    assert time.monotonic() - started < 2


def test_leaving_a_stream_ends_its_thread(writer: Any) -> None:
    def writing() -> bool:
        return any(thread.name == "reply" for thread in threading.enumerate())

    no_end = len(writer.tokenizer)  # an id that is never written
    pieces = stream(
        writer.model, writer.tokenizer, writer.prompt("x y z"), [no_end],
        Sampling(max_new_tokens=1900, temperature=5.0, top_k=0, seed=1),
    )  # fmt: skip
    assert next(pieces)
    assert writing()
    pieces.close()  # type: ignore[attr-defined]
    assert not writing()


def test_a_fault_while_writing_reaches_the_reader(writer: Any) -> None:
    def broken() -> bool:
        raise RuntimeError("the GPU fell off")

    with pytest.raises(RuntimeError, match="fell off"):
        list(begun(writer, broken))


# Batches


def cost(widths: list[int], cuts: list[tuple[int, int]], overhead: float) -> float:
    return sum((end - start) * widths[end - 1] + overhead for start, end in cuts)


@given(
    st.lists(st.integers(1, 300), max_size=7).map(sorted), st.integers(1, 7), st.integers(0, 500)
)
def test_batches_are_whole_small_enough_and_of_least_cost(
    widths: list[int], at_most: int, overhead: int
) -> None:
    found = batches(widths, at_most, overhead)
    assert [row for start, end in found for row in range(start, end)] == list(range(len(widths)))
    assert all(0 < end - start <= at_most for start, end in found)
    inner = range(1, len(widths))
    for cuts in chain.from_iterable(combinations(inner, size) for size in range(len(widths))):
        other = list(pairwise([0, *cuts, len(widths)]))
        if all(end - start <= at_most for start, end in other):
            assert cost(widths, found, overhead) <= cost(widths, other, overhead)
