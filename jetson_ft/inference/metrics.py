"""Metrics of replies: language, end of turn, repetition, similarity to the reference answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jetson_ft.inference.generate import Reply

_NGRAM = 4  # characters
# CJK ideographs: extension A, the basic block, compatibility, extensions B to H; and 〇.
_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af\u3007]")


def is_cjk(character: str) -> bool:
    """Return whether it is a Chinese character (a CJK ideograph of any Unicode block)."""
    return _CJK.match(character) is not None


def chinese_share(text: str) -> float:
    """Return Chinese characters as a share of all letters; 0 for a text without letters."""
    letters = [c for c in text if c.isalpha() or is_cjk(c)]
    return sum(map(is_cjk, letters)) / len(letters) if letters else 0.0


def repetition(text: str) -> float:
    """Return the share of the text's character 4-grams that occur earlier in it, from 0 to 1."""
    ngrams = [text[start : start + _NGRAM] for start in range(len(text) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def reply_metrics(replies: Sequence[Reply], references: Sequence[str]) -> dict[str, float]:
    """Return the means over all replies, with corpus chrF and BLEU (0 to 100).

    Both are sacrebleu's, BLEU with its Chinese tokenisation. Sources: Popović 2015 (chrF),
    Papineni et al. 2002 (BLEU).
    """
    from sacrebleu.metrics import BLEU, CHRF

    texts = [reply.text for reply in replies]
    count = max(1, len(replies))
    return {
        "chinese_share": sum(map(chinese_share, texts)) / count,
        "stop_rate": sum(reply.ended for reply in replies) / count,
        "repetition": sum(map(repetition, texts)) / count,
        "chrf": CHRF().corpus_score(texts, [list(references)]).score if texts else 0.0,
        "bleu": BLEU(tokenize="zh").corpus_score(texts, [list(references)]).score if texts else 0.0,
    }
