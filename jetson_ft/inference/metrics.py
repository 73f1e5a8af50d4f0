"""Metrics of replies: language, end of turn, repetition, similarity to the reference answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from jetson_ft.inference.statistics import paired_difference, ratio

_NGRAM = 4  # characters
# CJK ideographs: extension A, the basic block, compatibility, extensions B to H; and 〇.
_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af\u3007]")

# A Chinese character, or a run of other letters and digits.
_TOKEN = re.compile(f"{_CJK.pattern}|(?:(?!{_CJK.pattern})[^\\W_])+")


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


def tokens_of(text: str) -> list[str]:
    """Return the text's tokens for ROUGE-L and distinct-n: Chinese characters, and other words.

    Words are in lower case; punctuation and blanks belong to no token.
    """
    return _TOKEN.findall(text.lower())


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L: F1 of the longest common subsequence of tokens, from 0 to 1.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, with beta 1. The
    subsequence is found bit-parallel: Hyyrö, Bit-parallel LCS-length computation revisited, 2004.
    """
    first, second = tokens_of(text), tokens_of(reference)
    if not first or not second:
        return 0.0
    places: dict[str, int] = {}
    for place, token in enumerate(second):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = (1 << len(second)) - 1
    row = everywhere
    for token in first:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    common = len(second) - row.bit_count()
    return 2 * common / (len(first) + len(second))


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct-n: different n-grams of tokens over all of them, from 0 to 1.

    Source: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models,
    2016.
    """
    tokens = [tokens_of(text) for text in texts]
    ngrams = [tuple(row[start : start + n]) for row in tokens for start in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def row_statistics(rows: Sequence[dict[str, Any]], side: str) -> dict[str, list[list[float]]]:
    """Return for each figure one row of statistics for each held-out row.

    A figure is computed from the column sums: see `FIGURES`.

    Args:
        rows: as `rows` of a run's heldout.json.
        side: `before` or `after`.
    """
    from sacrebleu.metrics import BLEU, CHRF

    sides = [row[side] for row in rows]
    texts = [each["reply"] for each in sides]
    references = [row["reference"] for row in rows]

    def extract(metric: Any) -> list[list[float]]:
        # sacrebleu's own statistics of a sentence, whose sums give its corpus scores.
        return metric._extract_corpus_statistics(texts, [references]) if texts else []

    def mean(values: Iterable[float]) -> list[list[float]]:
        return [[float(value), 1.0] for value in values]

    nats = [each["nats"] for each in sides]
    return {
        "loss": [[n, row["tokens"]] for n, row in zip(nats, rows, strict=True)],
        "bits_per_char": [
            [n / math.log(2), row["characters"]] for n, row in zip(nats, rows, strict=True)
        ],
        "chinese_share": mean(map(chinese_share, texts)),
        "stop_rate": mean(each["ended"] for each in sides),
        "repetition": mean(map(repetition, texts)),
        "rouge_l": mean(map(rouge_l, texts, references)),
        "chrf": extract(CHRF()),
        "bleu": extract(BLEU(tokenize="zh")),
    }


def _sacrebleu_score(metric: str, sums: Any) -> Any:
    """Return the corpus scores, 0 to 100, for sums of sacrebleu's statistics.

    Sources: Popović 2015 (chrF), Papineni et al. 2002 (BLEU, with Chinese tokenisation).
    """
    import numpy as np
    from sacrebleu.metrics import BLEU, CHRF

    scorer = {"chrf": CHRF, "bleu": BLEU}[metric]()
    return np.array(
        [scorer._compute_score_from_stats(row).score for row in sums.astype(int).tolist()]
    )


# How a figure is computed from column sums, where it isn't the first sum over the second.
FIGURES: dict[str, Callable[[Any], Any]] = {
    name: partial(_sacrebleu_score, name) for name in ("chrf", "bleu")
}


def figures(statistics: dict[str, list[list[float]]]) -> dict[str, float]:
    """Return the figures of one side: means over the rows, ratios of sums, corpus chrF and BLEU."""
    import numpy as np

    result = {}
    for name, table in statistics.items():
        sums = np.asarray(table, float).sum(0, keepdims=True) if table else None
        result[name] = 0.0 if sums is None else float(FIGURES.get(name, ratio)(sums)[0])
    return result


def differences(
    before: dict[str, list[list[float]]], after: dict[str, list[list[float]]]
) -> dict[str, dict[str, Any]]:
    """Return each figure's difference between two sides, with its interval.

    The statistics are those of the same rows; a figure without rows is left out.
    """
    result = {}
    for name, table in before.items():
        if pair := paired_difference(table, after[name], FIGURES.get(name, ratio)):
            result[name] = asdict(pair)
    return result


MAX_CATEGORIES = 20


def by_category(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> list[dict[str, Any]]:
    """Return bits per character by the rows' category, the most frequent categories first.

    It is empty where the rows have no categories, or all the same one.
    """
    counts = Counter(row["category"] for row in rows)
    if len(counts) < 2:
        return []
    result = []
    for category, count in counts.most_common(MAX_CATEGORIES):
        own = [row for row in rows if row["category"] == category]
        entry: dict[str, Any] = {"name": category, "rows": count}
        tables = [
            [[row[side]["nats"] / math.log(2), row["characters"]] for row in own] for side in sides
        ]
        for side, table in zip(sides, tables, strict=True):
            entry[side] = figures({"bits_per_char": table})["bits_per_char"]
        if len(sides) == 2:
            pair = paired_difference(tables[0], tables[1])
            entry["difference"] = asdict(pair) if pair else None
        result.append(entry)
    return result
