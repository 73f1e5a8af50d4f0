"""The bundled rows with short answers: short, ended, different from each other, held-out apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import combinations, product

import pytest

from jetson_ft.data.sources import BUNDLED

CATEGORIES = {
    "advice", "definition", "fact", "greeting", "language", "list", "translation", "yesno",
}  # fmt: skip


@cache
def rows(name: str) -> list[tuple[str, str, str]]:
    """Return (category, question, answer) of each row."""
    lines = getattr(BUNDLED["bundled-short"], name).read_text(encoding="utf-8").splitlines()
    result = []
    for row in map(json.loads, lines):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        result.append((row["category"], user["content"], assistant["content"]))
    return result


def everything() -> list[tuple[str, str, str]]:
    return rows("train") + rows("heldout")


def is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def is_english(question: str) -> bool:
    return not any(map(is_chinese, question))


@cache
def ngrams(text: str) -> frozenset[str]:
    return frozenset(text[start : start + 4] for start in range(max(1, len(text) - 3)))


def similar(pairs: Iterable[tuple[str, str]], limit: float) -> list[tuple[str, str]]:
    """Return the pairs that share more 4-grams than `limit`, by Jaccard's index."""
    return [
        (a, b) for a, b in pairs
        if len(ngrams(a) & ngrams(b)) > limit * len(ngrams(a) | ngrams(b))
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "least"), [("train", 1500, 50), ("heldout", 100, 3)])
def test_every_category_has_rows(name: str, count: int, least: int) -> None:
    counts = Counter(category for category, _, _ in rows(name))
    assert set(counts) == CATEGORIES
    assert len(rows(name)) >= count and min(counts.values()) >= least


def test_answers_are_short_and_end() -> None:
    for _, question, answer in everything():
        assert question == question.strip() and answer == answer.strip()
        assert len(answer) <= 45, answer
        assert answer.endswith(("。", "！", "？", "”")), answer


def test_answers_are_simplified_chinese() -> None:
    for _, _, answer in everything():
        letters = [character for character in answer if character.isalpha()]
        share = sum(map(is_chinese, letters)) / len(letters)
        assert share >= 0.4, answer  # names of programming languages and commands are Latin
    text = "".join(answer for _, _, answer in everything())
    assert not {c for c in text if is_chinese(c) and not c.encode("gb2312", "ignore")}


@pytest.mark.parametrize(("name", "low", "high"), [("train", 0.3, 0.4), ("heldout", 0.5, 0.6)])
def test_english_questions_ask_for_chinese(name: str, low: float, high: float) -> None:
    english = [question for _, question, _ in rows(name) if is_english(question)]
    assert low <= len(english) / len(rows(name)) <= high
    assert [question for question in english if "chinese" not in question.lower()] == []


def test_questions_and_answers_are_unique() -> None:
    for column in (1, 2):
        counts = Counter(row[column] for row in everything())
        assert [text for text, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("column", [1, 2])
def test_no_two_rows_are_paraphrases(column: int) -> None:
    texts = [row[column] for row in everything()]
    assert similar(combinations(texts, 2), limit=0.5) == []


def test_no_heldout_answer_is_in_training() -> None:
    pairs = product([row[2] for row in rows("heldout")], [row[2] for row in rows("train")])
    assert similar(pairs, limit=0.45) == []
