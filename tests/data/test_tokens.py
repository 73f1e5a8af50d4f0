"""Rows as ids on disk: encoded once, cut or dropped by length, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from jetson_ft.data import tokens
from jetson_ft.data.template import END, encode
from jetson_ft.data.tokens import token_counts, tokenise
from jetson_ft.errors import UserError
from jetson_ft.models.load import load_tokenizer
from jetson_ft.models.resolve import Base
from jetson_ft.paths import cache_dir

# 3, 20 and 60 tokens, since the tokenizer's are bytes.
ANSWERS = ["好", "a" * 20, "天地玄黄" * 5]


def rows_of(answers: list[str]) -> Dataset:
    rows = [
        {"row": 10 + n, "messages": [{"role": "user", "content": "Q?"},
                                     {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]  # fmt: skip
    return Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    return cache_dir("tokens")


@pytest.fixture
def chat(tiny_llama: Path) -> Any:
    return load_tokenizer(Base("tiny", tiny_llama))


@pytest.fixture
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, encoding fails."""

    def encode_nothing(*_: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(tokens, "encode", encode_nothing)


def full_lengths(tokenizer: Any, rows: Dataset) -> list[int]:
    return [len(encode(tokenizer, row["messages"]).ids) for row in rows]


def test_rows_keep_their_numbers_and_are_encoded_as_the_template_says(chat: Any) -> None:
    rows = rows_of(ANSWERS)
    found, report = tokenise(rows, "sum", chat, 1000)
    expected = [encode(chat, row["messages"]) for row in rows]
    assert found["row"][:] == [10, 11, 12]
    assert found["input_ids"][:] == [e.ids for e in expected]
    assert found["parts"][:] == [e.parts for e in expected]
    assert found["answer_characters"][:] == [1, 20, 20]
    assert token_counts(found).tolist() == full_lengths(chat, rows)
    assert token_counts(found).dtype == np.int64
    assert "messages" not in found.column_names
    assert (report.rows, report.dropped, report.truncated) == (3, {}, 0)


def test_the_report_counts_tokens_and_lengths(chat: Any) -> None:
    rows = rows_of(ANSWERS)
    lengths = full_lengths(chat, rows)
    _, report = tokenise(rows, "sum", chat, 1000)
    assert report.tokens == sum(lengths)
    assert report.supervised_tokens == (3 + 1) + (20 + 1) + (60 + 1)  # bytes, and the end token
    assert report.tokens_per_character == round(sum(lengths) / (1 + 20 + 20 + 3 * 2), 3)
    assert report.lengths["p50"] == lengths[1] and report.lengths["max"] == lengths[2]
    assert report.as_json()["from_cache"] is False


# The cache


def test_a_second_start_encodes_nothing(
    chat: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    first, told = tokenise(rows_of(ANSWERS), "sum", chat, 30)
    request.getfixturevalue("no_encoding")
    second, told_again = tokenise(rows_of(ANSWERS), "sum", chat, 30)
    assert second.to_list() == first.to_list()
    assert told_again.as_json() == told.as_json() | {"from_cache": True}


@pytest.mark.parametrize("changed", ["rows", "max_length", "over_length", "template", "vocabulary"])
def test_whatever_the_ids_depend_on_makes_another_key(
    chat: Any, tiny_phi: Path, changed: str, request: pytest.FixtureRequest
) -> None:
    tokenise(rows_of(ANSWERS), "sum", chat, 90)
    request.getfixturevalue("no_encoding")
    if changed == "template":
        chat.chat_template += " "
    elif changed == "vocabulary":
        chat.add_tokens(["好"])
    arguments = {
        "rows_sha256": "other" if changed == "rows" else "sum",
        "max_length": 91 if changed == "max_length" else 90,
        "over_length": "drop" if changed == "over_length" else "truncate",
    }
    with pytest.raises(AssertionError, match="encoded"):
        tokenise(rows_of(ANSWERS), tokenizer=chat, **arguments)


@pytest.mark.parametrize("spoilt", ["empty", "half", "other rows"])
def test_a_spoilt_cache_file_is_written_anew(chat: Any, cache: Path, spoilt: str) -> None:
    good, _ = tokenise(rows_of(ANSWERS * 50), "sum", chat, 1000)
    (file,) = cache.glob("*.arrow")
    content = file.read_bytes()
    file.unlink()
    if spoilt == "other rows":
        good.select(range(7)).save_to_disk(cache / "other")
        next((cache / "other").glob("*.arrow")).rename(file)
    else:
        file.write_bytes(content[: len(content) // 2 if spoilt == "half" else 0])
    found, report = tokenise(rows_of(ANSWERS * 50), "sum", chat, 1000)
    assert found.to_list() == good.to_list()
    assert not report.from_cache


def test_a_refused_row_leaves_nothing_in_the_cache(chat: Any, cache: Path) -> None:
    chat.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="refuses a conversation: no"):
        tokenise(rows_of(ANSWERS), "sum", chat, 1000)
    assert list(cache.iterdir()) == []


# Rows that are too long


def test_a_long_row_is_cut_and_counted(chat: Any) -> None:
    rows = rows_of(ANSWERS)
    whole = encode(chat, rows[2]["messages"])
    limit = len(whole.ids) - 10
    found, report = tokenise(rows, "sum", chat, limit)
    assert found[2]["input_ids"] == whole.ids[:limit]
    assert END not in found[2]["parts"]
    assert (report.rows, report.truncated, report.dropped) == (3, 1, {})
    assert report.lengths["max"] == limit + 10
    assert report.tokens == sum(token_counts(found))


def test_characters_of_a_cut_answer_are_those_that_its_tokens_hold(chat: Any) -> None:
    rows = rows_of(["天地玄黄" * 5])
    layout = 2  # the end token and a line break
    limit = len(encode(chat, rows[0]["messages"]).ids) - layout - 4  # 56 bytes: 18 whole characters
    found, _ = tokenise(rows, "sum", chat, limit)
    assert found["answer_characters"][:] == [18]


def test_only_learnt_answers_have_their_characters_counted(chat: Any) -> None:
    chat.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}"
        "{% else %}(an answer){% endif %}{{ eos_token }}{% endfor %}"
    )
    turns = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "ddd")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found, _ = tokenise(Dataset.from_list([{"row": 1, "messages": messages}]), "x", chat, 100)
    assert found["answer_characters"][:] == [3]


def test_a_row_whose_answer_lies_behind_the_cut_is_dropped(chat: Any) -> None:
    long = [{"role": "user", "content": "Q" * 200}, {"role": "assistant", "content": "A"}]
    rows = Dataset.from_list([*rows_of(["short"]), {"row": 5, "messages": long}])
    found, report = tokenise(rows, "sum", chat, 100)
    assert found["row"][:] == [10]
    assert (report.rows, report.dropped) == (1, {"no answer within max_length": 1})
    assert report.tokens == len(found[0]["input_ids"])


def test_long_rows_are_dropped_where_that_is_wanted(chat: Any) -> None:
    limit = full_lengths(chat, rows_of(ANSWERS))[1]
    found, report = tokenise(rows_of(ANSWERS), "sum", chat, limit, "drop")
    assert found["row"][:] == [10, 11]
    assert (report.dropped, report.truncated) == ({"longer than max_length": 1}, 0)


def test_where_no_row_is_left_the_error_says_how_long_they_are(chat: Any) -> None:
    median = full_lengths(chat, rows_of(ANSWERS))[1]
    with pytest.raises(UserError, match="No row is left to learn from") as caught:
        tokenise(rows_of(ANSWERS), "sum", chat, 5)
    assert caught.value.where == "data.max_length = 5"
    assert f"{median} tokens in the median" in caught.value.fix
