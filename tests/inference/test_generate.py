"""A reply is the same alone, in a batch and as a stream, and ends where it should."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import fields, replace
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loaded_phi import LoadedModel

from jetson_ft.errors import UserError
from jetson_ft.inference import generate
from jetson_ft.inference.generate import (
    Reply,
    Sampling,
    _decode_reply,
    _whole_characters,
    generate_replies,
    plan_batches,
    stream_reply,
)

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)
TEXTS = ["你好", "第1题：3加4等于几？", "a", "hello there, who are you and what can you do?", "b b"]


def replies_to(phi: Any, texts: list[str], limit: int = 24, **options: Any) -> list[Reply]:
    prompts = [phi.prompt(text) for text in texts]
    return generate_replies(phi.model, phi.tokenizer, prompts, phi.eos_ids, limit, **options)


def streamed(phi: Any, text: str, sampling: Sampling, ends: list[int] | None = None) -> str:
    deltas = stream_reply(phi.model, phi.tokenizer, phi.prompt(text), ends or phi.eos_ids, sampling)
    return "".join(deltas)


def test_a_stream_returns_the_reply_with_its_tokens(phi: Any) -> None:
    def whole(text: str) -> Generator[str, None, None]:
        sampling = replace(GREEDY, max_new_tokens=24)
        prompt = phi.prompt(text)
        returned.append(
            (yield from stream_reply(phi.model, phi.tokenizer, prompt, phi.eos_ids, sampling))
        )

    returned: list[Reply] = []
    for text in TEXTS:
        list(whole(text))
    assert returned == replies_to(phi, TEXTS)


def test_a_continued_reply_keeps_the_space_between_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokenizers of SentencePiece drop the space before the first word that they decode."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)

    def generate_b(*args: Any, streamer: Any, **_: Any) -> Any:
        import torch

        prompt = torch.tensor([[*args[2][0], 1]])
        streamer.put(prompt[:, :-1])
        streamer.put(prompt[0, -1:])
        streamer.end()
        return prompt

    monkeypatch.setattr(generate, "_generate", generate_b)
    for prefill_ids, text in (([], "b"), ([0], " b")):
        stream = stream_reply(None, tokenizer, [0], [2], GREEDY, prefill_ids=prefill_ids)
        assert "".join(stream) == text


def test_batch_gives_the_same_replies_as_single_prompts(phi: Any) -> None:
    batch = replies_to(phi, TEXTS)
    assert batch == [replies_to(phi, [text])[0] for text in TEXTS]
    assert len({reply.text for reply in batch}) > 2


def test_replies_keep_the_order_of_prompts_and_report_progress(phi: Any) -> None:
    counts: list[int] = []
    replies = replies_to(
        phi, TEXTS, 8, progress=lambda done, total: counts.append(done), batch_size=lambda width: 2
    )
    assert replies == replies_to(phi, TEXTS, 8)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 5 and len(counts) > 3


def test_no_prompts_give_no_replies(phi: Any) -> None:
    assert replies_to(phi, []) == []


def test_token_without_an_embedding_is_refused(phi: Any) -> None:
    rows = len(phi.model.get_input_embeddings().weight)
    with pytest.raises(UserError, match="no embedding for"):
        list(stream_reply(phi.model, phi.tokenizer, [5, rows], phi.eos_ids, GREEDY))


@pytest.mark.parametrize("limit", range(1, 14))
def test_stream_gives_the_same_reply_as_a_batch(phi: Any, limit: int) -> None:
    """At every length, so that some of the limits cut a character in half."""
    for text in TEXTS[:2]:
        whole = streamed(phi, text, replace(GREEDY, max_new_tokens=limit))
        assert whole.strip() == replies_to(phi, [text], limit)[0].text
        assert not whole.endswith("\ufffd")


def test_end_token_ends_the_reply_and_is_not_in_its_text(phi: Any) -> None:
    unended = replies_to(phi, ["你好"], 30)[0]
    ids = phi.tokenizer(unended.text, add_special_tokens=False)["input_ids"]
    eos_id = ids[-1]
    prompts = [phi.prompt("你好")]
    ended = generate_replies(phi.model, phi.tokenizer, prompts, [eos_id], 30)[0]
    assert ended.ended and not unended.ended
    assert unended.text.startswith(ended.text)
    assert len(ended.text) < len(unended.text)


def ids_of(phi: Any, text: str) -> list[int]:
    return list(phi.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "cut", "reply"),
    [
        ("你好", 0, Reply("你好", False, 6)),
        ("你好", 1, Reply("你", False, 5)),
        ("你好", 2, Reply("你", False, 4)),
        (" 你 ", 0, Reply("你", False, 5)),
        ("你<|endoftext|>好", 0, Reply("你", True, 3)),
        ("<|endoftext|>", 0, Reply("", True)),
    ],
)
def test_decoding_cuts_at_the_end_token_and_at_half_characters(
    phi: Any, text: str, cut: int, reply: Reply
) -> None:
    ids = ids_of(phi, text)
    assert _decode_reply(phi.tokenizer, ids[: len(ids) - cut], phi.eos_ids) == reply


@given(st.lists(st.text(alphabet="ab\ufffd", max_size=4)))
def test_only_a_last_half_character_is_left_out(deltas: list[str]) -> None:
    assert "".join(_whole_characters(deltas)) == "".join(deltas).rstrip("\ufffd")
    assert all(_whole_characters(deltas))


# --- sampling ----------------------------------------------------------------------------


def test_same_seed_repeats_the_reply_and_another_differs(phi: Any) -> None:
    sampled = Sampling(max_new_tokens=20, temperature=1.5, seed=4)
    first = streamed(phi, "你好", sampled)
    assert streamed(phi, "你好", sampled) == first
    assert streamed(phi, "你好", replace(sampled, seed=5)) != first


def test_keeping_only_the_likeliest_token_equals_greedy(phi: Any) -> None:
    greedy = streamed(phi, "你好", Sampling(max_new_tokens=12))
    assert streamed(phi, "你好", Sampling(12, temperature=2.0, top_k=1)) == greedy
    assert streamed(phi, "你好", Sampling(12, temperature=0.7, top_p=1e-6)) == greedy


def test_repetition_penalty_reduces_repeats(phi: Any) -> None:
    def distinct(penalty: float) -> int:
        return len(set(streamed(phi, "你好", Sampling(60, repetition_penalty=penalty))))

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
def test_value_out_of_range_is_refused_with_the_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Sampling(**values)
    assert str(caught.value.fix).startswith("From ")


@pytest.mark.parametrize("option", fields(Sampling), ids=lambda option: str(option.name))
def test_default_and_slider_bounds_are_accepted(option: Any) -> None:
    for value in (option.default, option.metadata.get("min"), option.metadata.get("max")):
        if value is not None:
            Sampling(**{option.name: value})


# --- stopping ----------------------------------------------------------------------------


def long_stream(phi: Any, should_stop: Any = lambda: False) -> Iterator[str]:
    """Return a stream that ends at its length limit, or when it is stopped."""
    sampling = replace(GREEDY, max_new_tokens=1900)
    return stream_reply(phi.model, phi.tokenizer, phi.prompt("你好"), [0], sampling, should_stop)


def test_should_stop_ends_the_stream_soon(phi: Any) -> None:
    checks = iter(range(1000))
    started = time.monotonic()
    text = "".join(long_stream(phi, lambda: next(checks) >= 10))
    assert 0 < len(ids_of(phi, text)) < 40
    assert time.monotonic() - started < 2


def test_closing_a_stream_ends_its_thread(phi: Any) -> None:
    def is_generating() -> bool:
        return any(thread.name == "reply" for thread in threading.enumerate())

    no_end = len(phi.tokenizer)  # an id that is never generated
    deltas = stream_reply(
        phi.model, phi.tokenizer, phi.prompt("x y z"), [no_end],
        Sampling(max_new_tokens=1900, temperature=5.0, top_k=0, seed=1),
    )  # fmt: skip
    assert next(deltas)
    assert is_generating()
    deltas.close()  # type: ignore[attr-defined]
    assert not is_generating()


def test_error_in_generation_is_raised_in_the_reader(phi: Any) -> None:
    def fail() -> bool:
        raise RuntimeError("the GPU fell off")

    with pytest.raises(RuntimeError, match="fell off"):
        list(long_stream(phi, fail))


# Batches


def cost(widths: list[int], cuts: list[tuple[int, int]], overhead: float) -> float:
    return sum((end - start) * widths[end - 1] + overhead for start, end in cuts)


@given(
    st.lists(st.integers(1, 300), max_size=7).map(sorted),
    st.lists(st.integers(1, 7), min_size=7, max_size=7),
    st.integers(0, 500),
)
def test_batches_hold_all_rows_within_the_limit_at_the_lowest_cost(
    widths: list[int], sizes: list[int], overhead: int
) -> None:
    batches = plan_batches(widths, sizes, overhead)
    assert [row for start, end in batches for row in range(start, end)] == list(range(len(widths)))
    assert all(0 < end - start <= sizes[end - 1] for start, end in batches)
    inner = range(1, len(widths))
    for cuts in chain.from_iterable(combinations(inner, size) for size in range(len(widths))):
        other = list(pairwise([0, *cuts, len(widths)]))
        if all(end - start <= sizes[end - 1] for start, end in other):
            assert cost(widths, batches, overhead) <= cost(widths, other, overhead)


# --- a table of positions ------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(short_gpt2: Path) -> LoadedModel:
    """Return a model that reads 64 tokens."""
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles

    base = BaseModelFiles("short", short_gpt2)
    model = loading.load_model(base, loading.WeightFormat("fp32"), "cpu")
    no_end = 258
    return LoadedModel(model, loading.load_tokenizer(base), [no_end])


def test_replies_end_with_the_position_table_and_leave_others_whole(gpt2: LoadedModel) -> None:
    from jetson_ft.models.positions import position_table_size

    limit = 20
    prompts = [list(range(10, 10 + size)) for size in (63, 3, 50, 44, 50, 62, 45)]
    lengths: list[int] = []

    class Recorder:
        pad_token_id = gpt2.tokenizer.pad_token_id

        def decode(self, ids: list[int], **_: Any) -> str:
            lengths.append(len(ids))
            return str(ids)

    assert position_table_size(gpt2.model) == 64
    batch = generate_replies(gpt2.model, Recorder(), prompts, [300], limit)
    spaces = [min(limit, 64 - len(prompt)) for prompt in prompts]
    assert sorted(lengths) == sorted(spaces)
    assert batch == [
        generate_replies(gpt2.model, Recorder(), [prompt], [300], limit)[0] for prompt in prompts
    ]


def test_prompt_that_fills_the_position_table_is_refused(gpt2: LoadedModel) -> None:
    with pytest.raises(UserError, match="64 tokens, and the model reads 64 at most"):
        generate_replies(gpt2.model, gpt2.tokenizer, [[5] * 64, [5]], gpt2.eos_ids, 4)
