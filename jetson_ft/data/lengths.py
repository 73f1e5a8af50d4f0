"""Row lengths as a histogram: what planning needs of a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jetson_ft.data.chat_template import ANSWER
from jetson_ft.data.formats import TEXT, ChatMessage

if TYPE_CHECKING:
    from datasets import Dataset

_GROUPS = 40


@dataclass(frozen=True)
class LengthHistogram:
    """Rows sorted by length, in groups of equal size; lengths in tokens.

    `groups` has for each group the mean tokens and the mean supervised tokens of a row.
    """

    rows: int
    longest: int
    groups: tuple[tuple[float, float], ...]

    @property
    def mean(self) -> float:
        """Mean tokens per row."""
        return sum(size for size, _ in self.groups) / len(self.groups)

    @property
    def tokens(self) -> float:
        """Tokens of all rows."""
        return self.rows * self.mean

    @property
    def supervised(self) -> float:
        """Share of the tokens that are supervised."""
        return sum(part for _, part in self.groups) / sum(size for size, _ in self.groups)

    @property
    def longest_prompt(self) -> int:
        """Tokens that are not supervised, in the group with the most of them."""
        return math.ceil(max(size - supervised for size, supervised in self.groups))

    @property
    def token_weighted_mean_length(self) -> float:
        """Mean tokens of the row that a token is in, over all tokens: E[n²] / E[n]."""
        return sum(size**2 for size, _ in self.groups) / sum(size for size, _ in self.groups)

    def cut(self, max_length: int) -> LengthHistogram:
        """Return the histogram after truncation at `max_length`, as if only answers were cut."""
        groups = tuple(
            (min(size, max_length), max(0.0, supervised - max(0.0, size - max_length)))
            for size, supervised in self.groups
        )
        return replace(self, longest=min(self.longest, max_length), groups=groups)

    def scaled(self, factor: float) -> LengthHistogram:
        """Return the histogram with each length times the factor."""
        groups = tuple((size * factor, supervised * factor) for size, supervised in self.groups)
        return replace(self, longest=math.ceil(self.longest * factor), groups=groups)


def measure_lengths(encoded: Dataset) -> LengthHistogram:
    """Return the histogram of rows that `tokenize_rows` has encoded."""
    columns = encoded.with_format("numpy")
    return lengths_from_counts(columns["length"][:], columns["supervised"][:])


def longest_prompt(encoded: Dataset) -> int:
    """Return the most tokens before the last answer of a row."""
    longest = 0
    for segments in encoded["segments"]:
        start = len(segments) - segments[::-1].index(ANSWER) - 1
        while start and segments[start - 1] == ANSWER:
            start -= 1
        longest = max(longest, start)
    return longest


def lengths_from_counts(sizes: Any, supervised: Any) -> LengthHistogram:
    """Return the histogram of the tokens and supervised tokens of each row, in the same order."""
    import numpy as np

    sizes, supervised = np.asarray(sizes, float), np.asarray(supervised, float)
    order = np.argsort(sizes, kind="stable")
    groups = np.array_split(order, min(_GROUPS, len(order)))
    return LengthHistogram(
        rows=len(sizes),
        longest=int(sizes.max()),
        groups=tuple((float(sizes[g].mean()), float(supervised[g].mean())) for g in groups),
    )


# --- without a tokenizer ----------------------------------------------------------------------

# Tokens per Chinese character, by the least size of a vocabulary that has it. Counted over 800 rows
# of alpaca_zh, and the bundled ones: 1.8 and 1.9 (SmolLM2), 0.84 and 0.95 (Llama 3), 0.65 and 0.78
# (151,643 tokens, Qwen to Qwen3); by the lengths below, 2.2 (Phi-1.5). Each message was tokenized
# without a template; the rate is what is left of its tokens, after 0.25 for each other character,
# by the Chinese characters. The totals are in the tests. For larger vocabularies (Gemma 3, Qwen3.5,
# Phi-4-mini) that of Qwen is taken.
_WIDE_CHARACTER_TOKENS = {150_000: 0.75, 100_000: 0.9, 0: 2.0}
_NARROW_CHARACTER_TOKENS = 0.25  # usual for English, with every vocabulary
_FIRST_WIDE = "\u2e80"  # where Unicode's East Asian scripts begin
_WIDE_SHARE = 0.8  # of the characters in both data sets of `KNOWN_LENGTHS`
_MESSAGE_TOKENS = 5  # what a chat template adds to a message
_LARGEST_COUNTED = 151_936  # the vocabulary, of a model's config, that Qwen's tokenizer goes with


def accuracy_of_estimate(vocabulary: int) -> str:
    """Return how near converted and estimated lengths are to what such a tokenizer counts."""
    if vocabulary <= _LARGEST_COUNTED:
        return "within 20%"
    return f"not checked for a vocabulary of {vocabulary:,}"


def token_factor(counted_vocabulary: int, vocabulary: int) -> float:
    """Return how many tokens a tokenizer makes of the known data sets for each of another's."""

    def per_character(size: int) -> float:
        return _WIDE_SHARE * _wide_tokens(size) + (1 - _WIDE_SHARE) * _NARROW_CHARACTER_TOKENS

    return per_character(vocabulary) / per_character(counted_vocabulary)


def estimate_lengths(
    rows: Iterable[list[ChatMessage]], vocabulary: int, max_length: int
) -> LengthHistogram:
    """Return the histogram of rows by their characters, for a tokenizer with that vocabulary.

    Rows are cut at `max_length`, as if only answers were cut; documents are split there.
    """
    wide_tokens = _wide_tokens(vocabulary)
    sizes, supervised = [], []
    for messages in rows:
        size = answers = 0.0
        for message in messages:
            text = message["content"]
            wide = sum(character >= _FIRST_WIDE for character in text)
            tokens = wide * wide_tokens + (len(text) - wide) * _NARROW_CHARACTER_TOKENS
            if message["role"] == TEXT:
                pieces = math.ceil((tokens + 1) / max_length)
                sizes += [math.ceil((tokens + 1) / pieces)] * pieces
                supervised += sizes[-pieces:]
                continue
            size += tokens + _MESSAGE_TOKENS
            answers += tokens + 1 if message["role"] == "assistant" else 0  # with its end token
        if size:
            sizes.append(math.ceil(size))
            supervised.append(math.ceil(answers))
    return lengths_from_counts(sizes, supervised).cut(max_length)


def _wide_tokens(vocabulary: int) -> float:
    return next(rate for least, rate in _WIDE_CHARACTER_TOKENS.items() if vocabulary >= least)


# By `data.train` and `model`, whose tokenizer counted; for planning without reading either. They
# have the groups of `lengths_from_counts`, of rows that are not truncated.
KNOWN_LENGTHS = {
    # Counted over 1,000 rows drawn from about 51 thousand. Which rows, and the template, are not
    # recorded, so that this count can't be repeated exactly.
    ("llamafactory/alpaca_zh", "microsoft/phi-1_5"): LengthHistogram(51_000, 1082, (
        (49, 21), (66, 29), (77, 34), (86, 40), (96, 54), (108, 61), (116, 69), (125, 78),
        (134, 83), (148, 102), (164, 116), (180, 120), (194, 149), (215, 159), (235, 182),
        (252, 209), (274, 225), (296, 235), (315, 256), (338, 294), (360, 307), (380, 331),
        (402, 356), (427, 358), (456, 390), (491, 437), (523, 472), (558, 502), (591, 535),
        (618, 570), (651, 612), (683, 636), (716, 678), (751, 701), (778, 739), (806, 760),
        (835, 794), (874, 831), (923, 883), (989, 943),
    )),
    # All rows, with the model's own template; a test counts both sets again.
    ("bundled", "embedded"): LengthHistogram(690, 553, (
        (114, 48), (155, 82), (183, 102), (192, 115), (200, 120), (206, 131), (209, 128),
        (213, 139), (216, 138), (220, 139), (223, 145), (226, 149), (231, 146), (235, 154),
        (239, 159), (242, 158), (245, 162), (248, 168), (251, 165), (254, 167), (258, 176),
        (263, 187), (268, 176), (272, 166), (276, 177), (281, 188), (287, 178), (291, 194),
        (299, 198), (306, 202), (316, 169), (327, 196), (337, 184), (347, 202), (355, 176),
        (362, 211), (371, 213), (388, 229), (408, 249), (458, 315),
    )),
    ("bundled-short", "embedded"): LengthHistogram(1680, 114, (
        (55, 13), (58, 15), (60, 16), (62, 18), (64, 19), (66, 21), (67, 22), (69, 24), (69, 24),
        (70, 24), (71, 24), (72, 26), (73, 27), (74, 28), (74, 29), (75, 28), (76, 29), (77, 29),
        (78, 31), (78, 31), (79, 31), (80, 32), (80, 32), (81, 32), (82, 32), (83, 33), (84, 33),
        (85, 35), (86, 34), (87, 35), (88, 36), (89, 36), (90, 37), (91, 38), (92, 37), (94, 39),
        (95, 39), (97, 40), (100, 42), (106, 45),
    )),
}  # fmt: skip
