"""Rows of token ids into packs: one sequence without padding that a model takes at once.

Rows that open alike (a template's system prompt, most often) hold that opening once: under
causal attention its states are the same in each of them (with dropout, one draw serves them all).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from jetson_ft.data.template import ANSWER

if TYPE_CHECKING:
    import torch


# Where attention lays the rows out whole again, its copies cost about a hundredth of a step.
_WORTH_SHARING = 0.02  # of the rows' tokens


@dataclass(frozen=True)
class Pack:
    """A shared opening, then the rest of each row; T tokens, R rows, S supervised positions."""

    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], places in a row
    row_lengths: list[int]  # [R] tokens of each row; on the host, where no GPU waits for them
    opening: int  # tokens that all rows begin with and the pack holds once
    positions: torch.Tensor  # [S] places whose next token is learnt
    targets: torch.Tensor  # [S] those next tokens
    is_answer: torch.Tensor  # [S] bool: an answer's token, not an end of turn

    @property
    def tokens(self) -> int:
        """Tokens in the pack; none of them is padding."""
        return int(self.input_ids.shape[1])

    def to(self, device: Any) -> Pack:
        """The same pack on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        host = {name: values.pop(name) for name in ("row_lengths", "opening")}
        return Pack(**host, **{name: value.to(device) for name, value in values.items()})


def pack(rows: Sequence[dict[str, Any]], *, share: bool = True) -> Pack:
    """Packs rows (`input_ids`, `parts` as `data.tokens` writes them) in the order given.

    Args:
        share: hold what all rows begin with once, where that saves enough.
    """
    import torch

    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    parts = [torch.as_tensor(row["parts"], dtype=torch.uint8) for row in rows]
    lengths = [len(row) for row in ids]
    opening = _shared_opening(ids, parts) if share else 0
    own = [torch.arange(len(row)) >= (opening if number else 0) for number, row in enumerate(ids)]
    all_ids, all_parts, held = torch.cat(ids), torch.cat(parts), torch.cat(own)
    in_row = torch.cat([torch.arange(length) for length in lengths])
    places = torch.where(held, held.cumsum(0) - 1, in_row)  # in the pack, of each row's tokens
    all_parts[in_row == 0] = 0  # nothing stands before a row's first token to predict it from
    learnt = torch.nonzero(all_parts).squeeze(1)
    return Pack(
        input_ids=all_ids[held][None],
        position_ids=in_row[held][None],
        row_lengths=lengths,
        opening=opening,
        positions=places[learnt - 1],
        targets=all_ids[learnt],
        is_answer=all_parts[learnt] == ANSWER,
    )


def _shared_opening(ids: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> int:
    """Tokens that all rows begin with, none of them learnt, each row having more than those."""
    alike = min(map(len, ids)) - 1 if len(ids) > 1 else 0
    for row, part in zip(ids, parts, strict=True):
        differs = (row[:alike] != ids[0][:alike]) | (part[:alike] != 0)
        alike = int(differs.nonzero()[0]) if differs.any() else alike
    saved = alike * (len(ids) - 1)
    return alike if saved > _WORTH_SHARING * sum(map(len, ids)) else 0


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of rows, by bin, each bin at most `capacity` tokens.

    A row longer than that gets a bin of its own. Johnson, "Near-optimal bin packing
    algorithms" (1973), section on best fit.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, bin), sorted
    for index in order:
        length = lengths[index]
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            filled.append([index])
            bisect.insort(room, (max(0, capacity - length), len(filled) - 1))
        else:
            free, number = room.pop(place)
            filled[number].append(index)
            bisect.insort(room, (free - length, number))
    return filled


def packs(rows: Sequence[dict[str, Any]], capacity: int, *, share: bool = True) -> Iterator[Pack]:
    """Packs of rows of at most `capacity` tokens together; capacity 0: one row each."""
    lengths = [len(row["input_ids"]) for row in rows]

    def tokens(chosen: list[int]) -> int:
        return sum(lengths[index] for index in chosen)

    # The fullest first: where its tensors lay, those of the others find room.
    for chosen in sorted(bins(lengths, capacity), key=tokens, reverse=True):
        yield pack([rows[index] for index in chosen], share=share)
