"""Figures about replies: language, endings, repetition, and likeness to the given answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from jetson_ft.inference.generate import Reply

_GRAM = 4


def is_cjk(character: str) -> bool:
    """Whether it is a Chinese character (CJK unified ideographs and their extensions)."""
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x323AF
        or 0xF900 <= code <= 0xFAFF
        or code == 0x3007  # 〇
    )


def chinese_share(text: str) -> float:
    """CJK characters as a share of all letters; 0 for a text without letters."""
    letters = [c for c in text if unicodedata.category(c)[0] == "L" or is_cjk(c)]
    return sum(map(is_cjk, letters)) / len(letters) if letters else 0.0


def repetition(text: str) -> float:
    """Share of the text's 4-grams of characters that occurred before in it; 0 to 1."""
    grams = [text[start : start + _GRAM] for start in range(len(text) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def reply_figures(replies: Sequence[Reply], references: Sequence[str]) -> dict[str, float]:
    """Means over all replies, and chrF and BLEU (sacrebleu, Chinese tokenisation).

    chrF: Popović 2015; BLEU: Papineni et al. 2002; both from 0 to 100.
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
