"""Pack rows of token ids: one sequence without padding that a model takes at once.

Rows that begin alike (with a template's system prompt, most often) have that prefix in the pack
once. Under causal attention its hidden states are the same in each row; with dropout, all rows
share one draw.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jetson_ft.data.chat_template import ANSWER

if TYPE_CHECKING:
    import torch


# The least share of the rows' tokens that a shared prefix must save. Where attention needs each
# row whole, its copies cost about a hundredth of a step.
_MIN_SAVING = 0.02


@dataclass(frozen=True)
class Pack:
    """A shared prefix, then the rest of each row; T tokens, R rows, S supervised positions."""

    input_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], each token's position in its row
    row_lengths: list[int]  # [R] tokens of each row; on the host, where no GPU is waited for
    shared_prefix: int  # tokens that all rows begin with, in the pack once
    positions: torch.Tensor  # [S] positions in the pack whose next token is trained on
    targets: torch.Tensor  # [S] those next tokens
    is_answer: torch.Tensor  # [S] bool: an answer's token, not an end of turn
    target_rows: torch.Tensor  # [S] the number of the row that the token belongs to

    @property
    def tokens(self) -> int:
        """Tokens in the pack; none of them is padding."""
        return int(self.input_ids.shape[1])

    def to(self, device: Any) -> Pack:
        """Return the pack with its tensors on another device."""
        tensors = {name: value for name, value in vars(self).items() if hasattr(value, "to")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack_rows(
    rows: Sequence[dict[str, Any]], *, share: bool = True, numbers: Sequence[int] | None = None
) -> Pack:
    """Pack rows (`input_ids`, `segments` as `data.tokenize` writes them) in the order given.

    With `share`, a common prefix is in the pack once, where that saves enough. `numbers` are the
    rows' numbers in `target_rows`; by default they count from 0.
    """
    import torch

    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    segments = [torch.as_tensor(row["segments"], dtype=torch.uint8) for row in rows]
    lengths = [len(row) for row in ids]
    shared_prefix = _shared_prefix(ids, segments) if share else 0
    all_ids, all_segments = torch.cat(ids), torch.cat(segments)
    in_row = torch.cat([torch.arange(length) for length in lengths])
    in_pack = in_row >= shared_prefix
    in_pack[: lengths[0]] = True
    # Each token's position in the pack; that of the first row's copy for a shared one.
    positions = torch.where(in_pack, in_pack.cumsum(0) - 1, in_row)
    all_segments[in_row == 0] = 0  # no token precedes a row's first one to predict it from
    trained = torch.nonzero(all_segments).squeeze(1)
    row_numbers = torch.as_tensor(range(len(rows)) if numbers is None else numbers)
    all_numbers = row_numbers.repeat_interleave(torch.as_tensor(lengths))
    return Pack(
        input_ids=all_ids[in_pack][None],
        position_ids=in_row[in_pack][None],
        row_lengths=lengths,
        shared_prefix=shared_prefix,
        positions=positions[trained - 1],
        targets=all_ids[trained],
        is_answer=all_segments[trained] == ANSWER,
        target_rows=all_numbers[trained],
    )


def _shared_prefix(ids: Sequence[torch.Tensor], segments: Sequence[torch.Tensor]) -> int:
    """Count the tokens that all rows begin with: none is trained on, and each row has more."""
    length = min(map(len, ids)) - 1 if len(ids) > 1 else 0
    for row, part in zip(ids, segments, strict=True):
        differs = (row[:length] != ids[0][:length]) | (part[:length] != 0)
        length = int(differs.nonzero()[0]) if differs.any() else length
    saved = length * (len(ids) - 1)
    return length if saved > _MIN_SAVING * sum(map(len, ids)) else 0


def best_fit_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of the rows in each bin of at most `capacity` tokens, or of one row.

    Best-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in order:
        length = lengths[index]
        place = bisect.bisect_left(space, (length, -1))
        if place == len(space):
            bins.append([index])
            bisect.insort(space, (max(0, capacity - length), len(bins) - 1))
        else:
            free, number = space.pop(place)
            bins[number].append(index)
            bisect.insort(space, (free - length, number))
    return bins


def make_packs(
    rows: Sequence[dict[str, Any]], capacity: int, *, share: bool = True
) -> Iterator[Pack]:
    """Yield packs of rows of at most `capacity` tokens together; capacity 0: one row each.

    Their `target_rows` are indices into `rows`.
    The fullest pack comes first, so that the others' tensors fit into the memory it used.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    bins = best_fit_bins(lengths, capacity)
    for indices in sorted(bins, key=lambda indices: sum(lengths[i] for i in indices), reverse=True):
        yield pack_rows([rows[index] for index in indices], share=share, numbers=indices)
