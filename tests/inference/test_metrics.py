"""Figures about replies, checked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.inference.generate import Reply
from jetson_ft.inference.metrics import chinese_share, is_cjk, repetition, reply_figures


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
def test_others_are_not_chinese(character: str) -> None:
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
def test_figures_are_shares(text: str) -> None:
    assert 0 <= chinese_share(text) <= 1
    assert 0 <= repetition(text) < 1


REPLIES = [Reply("今天天气很好。", 7, True), Reply("the the the the", 15, False)]
REFERENCES = ["今天天气很好。", "今天天气不好。"]


def test_means_over_replies() -> None:
    found = reply_figures(REPLIES, REFERENCES)
    assert found["chinese_share"] == 0.5
    assert found["stop_rate"] == 0.5
    assert found["repetition"] == pytest.approx((0 + 8 / 12) / 2)


def test_chrf_and_bleu_are_sacrebleus_for_chinese() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    texts = [reply.text for reply in REPLIES]
    found = reply_figures(REPLIES, REFERENCES)
    assert found["chrf"] == corpus_chrf(texts, [REFERENCES]).score
    assert found["bleu"] == corpus_bleu(texts, [REFERENCES], tokenize="zh").score
    assert (found["chrf"], found["bleu"]) == pytest.approx((44.52, 53.42), abs=0.01)


def test_a_perfect_copy_scores_a_hundred() -> None:
    replies = [Reply(text, 7, True) for text in REFERENCES]
    found = reply_figures(replies, REFERENCES)
    assert (found["chrf"], found["bleu"]) == pytest.approx((100, 100))


def test_no_replies_are_no_fault() -> None:
    assert set(reply_figures([], []).values()) == {0.0}
