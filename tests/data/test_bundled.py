"""The bundled rows with long answers: enough, well formed, different, held-out apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest

from jetson_ft.data.layouts import to_conversation
from jetson_ft.data.sources import BUNDLED

Row = dict[str, Any]
KINDS = {
    "knowledge", "daily_life", "rewriting", "summarising", "translation", "arithmetic", "code",
    "edge_devices", "safety", "multi_turn",
}  # fmt: skip


@cache
def rows(name: str) -> list[Row]:
    path = getattr(BUNDLED["bundled"], name)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def everything() -> list[Row]:
    return [*rows("train"), *rows("heldout")]


def text_of(row: Row, role: str) -> str:
    return "\n".join(m["content"] for m in row["messages"] if m["role"] == role)


def grams(text: str, size: int) -> frozenset[str]:
    return frozenset(text[at : at + size] for at in range(len(text) - size + 1))


def overlap(mine: frozenset[str], other: frozenset[str]) -> float:
    """Share of the smaller one's n-grams that the other has too."""
    return len(mine & other) / max(1, min(len(mine), len(other)))


def too_close(
    pairs: Iterator[tuple[Row, Row]], role: str, size: int, limit: float
) -> list[tuple[str, str, float]]:
    known = {row["id"]: grams(text_of(row, role), size) for row in everything()}
    pairs_with_overlap = (
        (a["id"], b["id"], overlap(known[a["id"]], known[b["id"]])) for a, b in pairs
    )
    return [each for each in pairs_with_overlap if each[2] >= limit]


def test_there_are_enough_rows() -> None:
    assert len(rows("train")) >= 600
    assert len(rows("heldout")) >= 60


def test_ids_are_unique() -> None:
    assert [i for i, n in Counter(row["id"] for row in everything()).items() if n > 1] == []


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_all_ten_kinds_are_there(name: str) -> None:
    counts = Counter(row["category"] for row in rows(name))
    assert set(counts) >= KINDS
    assert min(counts[kind] for kind in KINDS) >= (40 if name == "train" else 4)


def test_every_row_is_a_conversation() -> None:
    for row in everything():
        assert to_conversation(row, "messages").messages == row["messages"], row["id"]
        assert all(m["content"] == m["content"].strip() for m in row["messages"]), row["id"]


def test_multi_turn_rows_have_several_turns() -> None:
    several = [row for row in everything() if row["category"] == "multi_turn"]
    assert all(sum(m["role"] == "user" for m in row["messages"]) >= 2 for row in several)


def test_the_characters_are_simplified() -> None:
    text = "".join(m["content"] for row in everything() for m in row["messages"])
    han = [c for c in text if "\u4e00" <= c <= "\u9fff"]
    outside = [c for c in han if c.encode("gb2312", "ignore") == b""]
    assert len(han) > 70_000
    assert len(outside) / len(han) < 0.001, sorted(set(outside))
    assert not set("國說這個們來對時會學點電腦請問為麼樣應該讓過還沒開關") & set(text)


def test_every_answer_is_chinese_except_a_translation_or_code() -> None:
    for row in everything():
        answer = text_of(row, "assistant")
        assert any("\u4e00" <= c <= "\u9fff" for c in answer), row["id"]
        assert "\ufffd" not in answer, row["id"]


@pytest.mark.parametrize(("role", "size"), [("user", 5), ("assistant", 6)])
def test_no_heldout_row_paraphrases_a_training_row(role: str, size: int) -> None:
    # Measured as the share of the held-out row's n-grams that a training row has.
    training = [(row["id"], grams(text_of(row, role), size)) for row in rows("train")]
    for row in rows("heldout"):
        mine = grams(text_of(row, role), size)
        for number, other in training:
            assert len(mine & other) < 0.15 * max(1, len(mine)), (row["id"], number)


def test_no_two_questions_come_from_one_template() -> None:
    assert too_close(combinations(everything(), 2), "user", 4, 0.6) == []


def test_no_two_answers_are_nearly_the_same() -> None:
    assert too_close(combinations(everything(), 2), "assistant", 6, 0.5) == []


def test_no_heldout_conversation_is_a_training_one() -> None:
    pairs = product(rows("train"), rows("heldout"))
    assert [(a["id"], b["id"]) for a, b in pairs if text_of(a, "user") == text_of(b, "user")] == []
