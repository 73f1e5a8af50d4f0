"""Rows as ids on disk: encoded once, cut or dropped by length, and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from jetson_ft.data import tokenize
from jetson_ft.data.chat_template import END, encode
from jetson_ft.data.tokenize import token_counts, tokenize_rows
from jetson_ft.errors import Message, UserError
from jetson_ft.files import cache_dir
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer

# 3, 20 and 60 tokens, since the tokenizer's are bytes.
ANSWERS = ["好", "a" * 20, "天地玄黄" * 5]


def rows_of(answers: list[str]) -> Dataset:
    rows = [
        {"row": 10 + n, "messages": [{"role": "user", "content": "Q?"},
                                     {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]  # fmt: skip
    return Dataset.from_list(rows)


@pytest.fixture
def cache() -> Path:
    return cache_dir("tokens")


@pytest.fixture
def chat(tiny_llama: Path) -> Any:
    return load_tokenizer(BaseModelFiles("tiny", tiny_llama))


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, encoding fails."""

    def encode_nothing(*_: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(tokenize, "encode_all", encode_nothing)


def full_lengths(tokenizer: Any, rows: Dataset) -> list[int]:
    return [len(encode(tokenizer, row["messages"]).ids) for row in rows]


def test_rows_keep_their_numbers_and_are_encoded_with_the_template(chat: Any) -> None:
    rows = rows_of(ANSWERS)
    encoded, report = tokenize_rows(rows, "sum", chat, 1000)
    expected = [encode(chat, row["messages"]) for row in rows]
    assert encoded["row"][:] == [10, 11, 12]
    assert encoded["input_ids"][:] == [e.ids for e in expected]
    assert encoded["segments"][:] == [e.segments for e in expected]
    assert encoded["answer_characters"][:] == [1, 20, 20]
    assert token_counts(encoded).tolist() == full_lengths(chat, rows)
    assert token_counts(encoded).dtype == np.int64
    assert "messages" not in encoded.column_names
    assert (report.rows, report.dropped, report.truncated) == (3, {}, 0)


def test_the_report_counts_tokens_and_lengths(chat: Any) -> None:
    rows = rows_of(ANSWERS)
    lengths = full_lengths(chat, rows)
    _, report = tokenize_rows(rows, "sum", chat, 1000)
    assert report.tokens == sum(lengths)
    assert report.supervised_tokens == (3 + 1) + (20 + 1) + (60 + 1)  # bytes, and the end token
    assert report.tokens_per_character == round(sum(lengths) / (1 + 20 + 20 + 3 * 2), 3)
    assert report.lengths["p50"] == lengths[1] and report.lengths["max"] == lengths[2]
    assert report.from_cache is False


# The cache


def test_second_call_encodes_nothing(
    chat: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    first, report = tokenize_rows(rows_of(ANSWERS), "sum", chat, 30)
    request.getfixturevalue("no_encoding")
    second, second_report = tokenize_rows(rows_of(ANSWERS), "sum", chat, 30)
    assert second.to_list() == first.to_list()
    assert second_report == replace(report, from_cache=True)


@pytest.mark.parametrize("changed", ["rows", "max_length", "truncation", "template", "vocabulary"])
def test_change_of_what_the_ids_depend_on_encodes_again(
    chat: Any, tiny_phi: Path, changed: str, request: pytest.FixtureRequest
) -> None:
    tokenize_rows(rows_of(ANSWERS), "sum", chat, 90)
    request.getfixturevalue("no_encoding")
    if changed == "template":
        chat.chat_template += " "
    elif changed == "vocabulary":
        chat.add_tokens(["好"])
    arguments = {
        "rows_key": "other" if changed == "rows" else "sum",
        "max_length": 91 if changed == "max_length" else 90,
        "truncation": "drop" if changed == "truncation" else "truncate",
    }
    with pytest.raises(AssertionError, match="encoded"):
        tokenize_rows(rows_of(ANSWERS), tokenizer=chat, **arguments)


@pytest.mark.parametrize("damage", ["empty", "half", "other rows"])
def test_damaged_cache_is_written_again(chat: Any, cache: Path, damage: str) -> None:
    good, _ = tokenize_rows(rows_of(ANSWERS * 50), "sum", chat, 1000)
    (file,) = cache.glob("*.arrow")
    content = file.read_bytes()
    file.unlink()
    if damage == "other rows":
        good.select(range(7)).save_to_disk(cache / "other")
        next((cache / "other").glob("*.arrow")).rename(file)
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    encoded, report = tokenize_rows(rows_of(ANSWERS * 50), "sum", chat, 1000)
    assert encoded.to_list() == good.to_list()
    assert not report.from_cache


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
)


def rows_with_a_system_message() -> Dataset:
    """Rows 10, 11, 12 as above; then row 13 with a system message."""
    system = [{"role": "system", "content": "S"}, *rows_of(["a"])[0]["messages"]]
    return Dataset.from_list([*rows_of(ANSWERS), {"row": 13, "messages": system}])


def test_row_that_the_template_refuses_is_named_with_its_number(chat: Any) -> None:
    chat.chat_template = NO_SYSTEM
    with pytest.raises(UserError, match="1 of 4 rows can't be encoded") as caught:
        tokenize_rows(rows_with_a_system_message(), "sum", chat, 1000)
    assert "(row 13): The model's chat template refuses a conversation: no system" in str(
        caught.value.what
    )
    assert "data.on_invalid=skip" in str(caught.value.fix)
    assert "data.chat_template" in str(caught.value.fix)


def test_row_that_the_template_refuses_is_skipped_and_counted(chat: Any) -> None:
    chat.chat_template = NO_SYSTEM
    for from_cache in (False, True):
        encoded, report = tokenize_rows(
            rows_with_a_system_message(), "sum", chat, 1000, on_invalid="skip"
        )
        assert encoded["row"][:] == [10, 11, 12]
        assert (report.rows, report.dropped) == (3, {"refused by the chat template": 1})
        assert "(row 13)" in str(Message.from_json(report.notices[0]))
        assert report.from_cache is from_cache
        assert report.lengths["p50"] == 24, "of the rows that are encoded"
    with pytest.raises(UserError, match="row 13"):
        tokenize_rows(rows_with_a_system_message(), "sum", chat, 1000)


def test_cached_refusal_is_an_error_without_skip_and_when_no_row_is_left(chat: Any) -> None:
    chat.chat_template = "{{ raise_exception('no {x}') }}"
    with pytest.raises(UserError, match="3 of 3 rows") as caught:
        tokenize_rows(rows_of(ANSWERS), "sum", chat, 1000, on_invalid="skip")
    assert "no {x}" in str(caught.value)


def test_report_counts_context_answers_system_messages_and_control_texts(chat: Any) -> None:
    turns = [("system", "S"), ("user", "<|im_end|>"), ("assistant", "a"), ("user", "c")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("assistant", "<|im_end|>")]]
    rows = Dataset.from_list([*rows_of(["b"]), {"row": 5, "messages": messages}])
    _, report = tokenize_rows(rows, "sum", chat, 1000)
    assert (report.context_answers, report.systems_dropped) == (0, 0)
    assert (report.control_rows, report.control_texts) == (1, 2)
    assert len(report.notices) == 1
    chat.chat_template = (  # without system messages and earlier answers
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    _, report = tokenize_rows(rows, "sum", chat, 1000)
    assert (report.context_answers, report.systems_dropped) == (1, 1)
    assert len(report.notices) == 3
    assert "chatml" in str(Message.from_json(report.notices[0]))


def test_tools_of_a_row_are_encoded_with_it(chat: Any) -> None:
    chat.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + chat.chat_template
    )
    tools = '[{"type": "function", "function": {"name": "humidity"}}]'
    rows = rows_of(["b", "c"]).add_column("tools", [tools, ""])
    encoded, _ = tokenize_rows(rows, "sum", chat, 1000)
    assert chat.decode(encoded[0]["input_ids"]).startswith("humidity<|im_start|>")
    assert chat.decode(encoded[1]["input_ids"]).startswith("<|im_start|>")


def test_refused_row_writes_nothing_to_the_cache(chat: Any, cache: Path) -> None:
    chat.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="refuses a conversation: no"):
        tokenize_rows(rows_of(ANSWERS), "sum", chat, 1000)
    assert list(cache.iterdir()) == []


# Rows that are too long


def test_long_row_is_truncated_and_counted(chat: Any) -> None:
    rows = rows_of(ANSWERS)
    whole = encode(chat, rows[2]["messages"])
    limit = len(whole.ids) - 10
    encoded, report = tokenize_rows(rows, "sum", chat, limit)
    assert encoded[2]["input_ids"] == whole.ids[:limit]
    assert END not in encoded[2]["segments"]
    assert (report.rows, report.truncated, report.dropped) == (3, 1, {})
    assert report.lengths["max"] == limit + 10
    assert report.tokens == sum(token_counts(encoded))


def test_truncated_answer_counts_the_characters_of_its_tokens(chat: Any) -> None:
    rows = rows_of(["天地玄黄" * 5])
    layout = 2  # the end token and a line break
    limit = len(encode(chat, rows[0]["messages"]).ids) - layout - 4  # 56 bytes: 18 whole characters
    encoded, _ = tokenize_rows(rows, "sum", chat, limit)
    assert encoded["answer_characters"][:] == [18]


def test_only_answers_trained_on_have_their_characters_counted(chat: Any) -> None:
    chat.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}"
        "{% else %}(an answer){% endif %}{{ eos_token }}{% endfor %}"
    )
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ddd")]
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded, _ = tokenize_rows(
        Dataset.from_list([{"row": 1, "messages": messages}]), "x", chat, 100
    )
    assert encoded["answer_characters"][:] == [3]


def test_row_whose_answer_is_cut_off_is_dropped(chat: Any) -> None:
    long = [{"role": "user", "content": "Q" * 200}, {"role": "assistant", "content": "A"}]
    rows = Dataset.from_list([*rows_of(["short"]), {"row": 5, "messages": long}])
    encoded, report = tokenize_rows(rows, "sum", chat, 100)
    assert encoded["row"][:] == [10]
    assert (report.rows, report.dropped) == (1, {"no answer within max_length": 1})
    assert report.tokens == len(encoded[0]["input_ids"])


def test_long_rows_are_dropped_with_truncation_drop(chat: Any) -> None:
    limit = full_lengths(chat, rows_of(ANSWERS))[1]
    encoded, report = tokenize_rows(rows_of(ANSWERS), "sum", chat, limit, "drop")
    assert encoded["row"][:] == [10, 11]
    assert (report.dropped, report.truncated) == ({"longer than max_length": 1}, 0)


@pytest.mark.parametrize("truncation", ["truncate", "drop"])
def test_no_row_left_is_refused_with_the_median_length(chat: Any, truncation: str) -> None:
    median = full_lengths(chat, rows_of(ANSWERS))[1]
    with pytest.raises(UserError, match="No row has an answer within max_length") as caught:
        tokenize_rows(rows_of(ANSWERS), "sum", chat, 5, truncation)
    assert str(caught.value.where) == "data.max_length = 5"
    assert f"median row has {median} tokens" in str(caught.value.fix)
    assert ("data.truncation" in str(caught.value.fix)) is (truncation == "drop")
