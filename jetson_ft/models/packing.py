"""Rows of token ids into packs: one sequence without padding that a model takes at once."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from jetson_ft.data.template import ANSWER

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pack:
    """Rows one behind the other; T tokens, R rows, S supervised positions."""

    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], starting anew with each row
    row_lengths: list[int]  # [R] tokens of each row; on the host, where no GPU waits for them
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
        lengths = values.pop("row_lengths")
        return Pack(row_lengths=lengths, **{k: value.to(device) for k, value in values.items()})


def pack(rows: Sequence[dict[str, Any]]) -> Pack:
    """Packs rows (`input_ids`, `parts` as `data.tokens` writes them) in the order given."""
    import torch

    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    parts = [torch.as_tensor(row["parts"], dtype=torch.uint8) for row in rows]
    all_ids, all_parts = torch.cat(ids), torch.cat(parts)
    bounds = torch.tensor([0] + [len(row) for row in ids]).cumsum(0)
    all_parts[bounds[:-1]] = 0  # nothing stands before a row's first token to predict it from
    learnt = torch.nonzero(all_parts).squeeze(1)
    return Pack(
        input_ids=all_ids[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in ids])[None],
        row_lengths=[len(row) for row in ids],
        positions=learnt - 1,
        targets=all_ids[learnt],
        is_answer=all_parts[learnt] == ANSWER,
    )


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


def packs(rows: Sequence[dict[str, Any]], capacity: int) -> Iterator[Pack]:
    """Packs of at most `capacity` tokens out of the rows; capacity 0: one row each."""
    lengths = [len(row["input_ids"]) for row in rows]
    for chosen in bins(lengths, capacity):
        yield pack([rows[index] for index in chosen])
