"""Metrics of replies, against values calculated by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.inference import metrics
from jetson_ft.inference.metrics import chinese_share, is_cjk, repetition, rouge_l


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


def row_of(reply: str, ended: bool, reference: str, **changes: object) -> dict[str, object]:
    """Return a row of heldout.json with one side."""
    side = {"nats": 2.0, "reply": reply, "ended": ended}
    row = {"characters": 4, "tokens": 8, "category": "", "reference": reference, "before": side}
    return row | changes


REFERENCES = ["今天天气很好。", "今天天气不好。"]
ROWS = [
    row_of("今天天气很好。", True, REFERENCES[0]),
    row_of("the the the the", False, REFERENCES[1]),
]


def figures(rows: list[dict[str, object]]) -> dict[str, float]:
    return metrics.figures(metrics.row_statistics(rows, "before"))


def test_two_replies_give_means() -> None:
    made = figures(ROWS)
    assert (made["chinese_share"], made["stop_rate"], made["rouge_l"]) == (0.5, 0.5, 0.5)
    assert made["repetition"] == pytest.approx((0 + 8 / 12) / 2)
    assert made["loss"] == 4.0 / 16
    assert made["bits_per_char"] == pytest.approx(4.0 / 0.6931471805599453 / 8)


def test_chrf_and_bleu_equal_sacrebleu_for_chinese() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    texts = ["今天天气很好。", "the the the the"]
    made = figures(ROWS)
    assert made["chrf"] == corpus_chrf(texts, [REFERENCES]).score
    assert made["bleu"] == corpus_bleu(texts, [REFERENCES], tokenize="zh").score
    assert (made["chrf"], made["bleu"]) == pytest.approx((44.52, 53.42), abs=0.01)


def test_replies_equal_to_references_score_100() -> None:
    made = figures([row_of(text, True, text) for text in REFERENCES])
    assert (made["chrf"], made["bleu"], made["rouge_l"]) == pytest.approx((100, 100, 1))


def test_no_replies_give_zeros() -> None:
    assert set(figures([]).values()) == {0.0}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello 世界abc", ["hello", "世", "界", "abc"]),
        ("3加4，re-do_x", ["3", "加", "4", "re", "do", "x"]),
        ("，。 🙂", []),
        ("Ünï 𠀀", ["ünï", "𠀀"]),
    ],
)
def test_tokens_are_chinese_characters_and_words(text: str, tokens: list[str]) -> None:
    assert metrics.tokens_of(text) == tokens


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("今天天气很好", "今天天气不好", 5 / 6),  # five of six characters in order
        ("the cat sat", "the cat", 2 * 2 / 5),
        ("好天", "天好", 0.5),
        ("", "天", 0.0),
        ("，。", "，。", 0.0),  # no tokens
    ],
)
def test_rouge_l(text: str, reference: str, score: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(score)


@given(st.text("天地 ab", max_size=12), st.text("天地 ab", max_size=12))
def test_rouge_l_equals_the_table_of_longest_common_subsequences(first: str, second: str) -> None:
    one, two = metrics.tokens_of(first), metrics.tokens_of(second)
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            longest = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else longest
    expected = 2 * table[-1][-1] / (len(one) + len(two)) if one and two else 0.0
    assert rouge_l(first, second) == pytest.approx(expected)


def test_distinct_is_over_all_replies() -> None:
    assert metrics.distinct(["a b a", "b a"], 1) == 2 / 5
    assert metrics.distinct(["a b a", "b a"], 2) == 2 / 3  # not across replies
    assert metrics.distinct(["", "a"], 2) == 0.0


def both(nats: tuple[float, float], category: str) -> dict[str, object]:
    sides = [{"nats": value, "reply": "a", "ended": True} for value in nats]
    return row_of("", True, "a", category=category, before=sides[0], after=sides[1])


def test_categories_have_their_own_figures_and_intervals() -> None:
    rows = [both((2.0 + n / 10, 1.0), "sums") for n in range(8)] + [both((1.0, 1.5), "other")]
    sums, other = metrics.by_category(rows, ("before", "after"))
    assert (sums["name"], sums["rows"], other["name"], other["rows"]) == ("sums", 8, "other", 1)
    assert sums["after"] == pytest.approx(1.0 / 0.6931471805599453 / 4)
    assert sums["difference"]["clear"] and sums["difference"]["difference"] < 0
    assert not other["difference"]["clear"], "one row shows nothing"
    assert metrics.by_category(rows[:8], ("before", "after")) == [], "all of one category"


def test_differences_have_the_figures_of_both_sides() -> None:
    rows = [both((2.0 + n / 10, 1.0), "") for n in range(8)]
    before, after = (metrics.row_statistics(rows, side) for side in ("before", "after"))
    made = metrics.differences(before, after)
    assert set(made) == set(before) and made["loss"]["clear"]
    assert made["chrf"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "clear": False}
    assert metrics.differences(metrics.row_statistics([], "before"), {k: [] for k in before}) == {}
