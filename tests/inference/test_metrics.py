"""Metrics of replies, against values calculated by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.inference.generate import Reply
from jetson_ft.inference.metrics import chinese_share, is_cjk, repetition, reply_metrics


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("你好", 1.0),
        ("你好 ab", 0.5),
        ("3加4等于7。", 1.0),  # digits and punctuation are no letters
        ("二〇二四年", 1.0),
        ("Hello!", 0.0),
        ("，。123 🙂", 0.0),
        ("", 0.0),
        ("日本ごα", 0.5),  # kana and Greek are letters, but not Chinese ones
        ("龍𠀀豈㐀x", 0.8),  # extensions and compatibility forms
    ],
)
def test_chinese_share(text: str, share: float) -> None:
    assert chinese_share(text) == pytest.approx(share)


@pytest.mark.parametrize("character", ["か", "가", "A", "、", "７", "é"])
def test_other_characters_are_not_cjk(character: str) -> None:
    assert not is_cjk(character)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("abc", 0.0),
        ("abcd", 0.0),
        ("abcdefgh", 0.0),
        ("aaaaa", 0.5),  # two 4-grams, one of them new
        ("abcdabcd", 0.2),  # five 4-grams, abcd twice
        ("啊" * 23, 0.95),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


@given(st.text())
def test_any_text_gives_shares_from_0_to_1(text: str) -> None:
    assert 0 <= chinese_share(text) <= 1
    assert 0 <= repetition(text) < 1


REPLIES = [Reply("今天天气很好。", True), Reply("the the the the", False)]
REFERENCES = ["今天天气很好。", "今天天气不好。"]


def test_two_replies_give_means() -> None:
    metrics = reply_metrics(REPLIES, REFERENCES)
    assert metrics["chinese_share"] == 0.5
    assert metrics["stop_rate"] == 0.5
    assert metrics["repetition"] == pytest.approx((0 + 8 / 12) / 2)


def test_chrf_and_bleu_equal_sacrebleu_for_chinese() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    texts = [reply.text for reply in REPLIES]
    metrics = reply_metrics(REPLIES, REFERENCES)
    assert metrics["chrf"] == corpus_chrf(texts, [REFERENCES]).score
    assert metrics["bleu"] == corpus_bleu(texts, [REFERENCES], tokenize="zh").score
    assert (metrics["chrf"], metrics["bleu"]) == pytest.approx((44.52, 53.42), abs=0.01)


def test_replies_equal_to_references_score_100() -> None:
    replies = [Reply(text, True) for text in REFERENCES]
    metrics = reply_metrics(replies, REFERENCES)
    assert (metrics["chrf"], metrics["bleu"]) == pytest.approx((100, 100))


def test_no_replies_give_zeros() -> None:
    assert set(reply_metrics([], []).values()) == {0.0}
