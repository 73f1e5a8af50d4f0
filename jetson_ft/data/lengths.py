"""How long rows are, as a histogram: all that planning needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jetson_ft.data import tokens

if TYPE_CHECKING:
    from datasets import Dataset

_GROUPS = 40


@dataclass(frozen=True)
class Lengths:
    """Rows sorted by length, in groups of equal size.

    `groups` has the mean tokens and the mean supervised tokens of a row in each.
    """

    rows: int
    longest: int
    groups: tuple[tuple[float, float], ...]

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return sum(size for size, _ in self.groups) / len(self.groups)

    @property
    def tokens(self) -> float:
        """Tokens of all rows."""
        return self.rows * self.mean

    @property
    def supervised(self) -> float:
        """Share of the tokens that are learnt."""
        return sum(learnt for _, learnt in self.groups) / sum(size for size, _ in self.groups)

    @property
    def row_of_a_token(self) -> float:
        """Tokens of the row that a token stands in, over all tokens: E[n²] / E[n]."""
        return sum(size**2 for size, _ in self.groups) / sum(size for size, _ in self.groups)

    def cut(self, max_length: int) -> Lengths:
        """With rows cut at `max_length`: what is cut off is of the answer."""
        groups = tuple(
            (min(size, max_length), max(0.0, learnt - max(0.0, size - max_length)))
            for size, learnt in self.groups
        )
        return replace(self, longest=min(self.longest, max_length), groups=groups)


def of(encoded: Dataset) -> Lengths:
    """The lengths of tokenised rows (as `data.tokens` writes them)."""
    return from_counts(tokens.token_counts(encoded), tokens.supervised_counts(encoded))


def from_counts(sizes: Any, learnt: Any) -> Lengths:
    """From the tokens and the supervised tokens of each row, in the same order."""
    import numpy as np

    sizes, learnt = np.asarray(sizes, float), np.asarray(learnt, float)
    order = np.argsort(sizes, kind="stable")
    groups = np.array_split(order, min(_GROUPS, len(order)))
    return Lengths(
        rows=len(sizes),
        longest=int(sizes.max()),
        groups=tuple((float(sizes[g].mean()), float(learnt[g].mean())) for g in groups),
    )


# By rows and by the model whose tokenizer counted, for planning without either at hand.
KNOWN = {
    # 1,000 rows drawn from the set were counted; it has about 51 thousand.
    ("llamafactory/alpaca_zh", "microsoft/phi-1_5"): Lengths(51_000, 1082, (
        (49, 21), (66, 29), (77, 34), (86, 40), (96, 54), (108, 61), (116, 69), (125, 78),
        (134, 83), (148, 102), (164, 116), (180, 120), (194, 149), (215, 159), (235, 182),
        (252, 209), (274, 225), (296, 235), (315, 256), (338, 294), (360, 307), (380, 331),
        (402, 356), (427, 358), (456, 390), (491, 437), (523, 472), (558, 502), (591, 535),
        (618, 570), (651, 612), (683, 636), (716, 678), (751, 701), (778, 739), (806, 760),
        (835, 794), (874, 831), (923, 883), (989, 943),
    )),
    ("bundled", "embedded"): Lengths(690, 553, (
        (114, 48), (155, 82), (183, 102), (192, 115), (200, 120), (206, 131), (209, 128),
        (213, 139), (216, 138), (220, 139), (223, 145), (226, 149), (231, 146), (235, 154),
        (239, 159), (242, 158), (245, 162), (248, 168), (251, 165), (254, 167), (258, 176),
        (263, 187), (268, 176), (272, 166), (276, 177), (281, 188), (287, 178), (291, 194),
        (299, 198), (306, 202), (316, 169), (327, 196), (337, 184), (347, 202), (355, 176),
        (362, 211), (371, 213), (388, 229), (408, 249), (458, 315),
    )),
}  # fmt: skip
