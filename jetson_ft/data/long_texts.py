"""Tokenize texts of any length in bounded memory.

A tokenizer's own result takes about 200 bytes for each token, 6 GB for a row of 30 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

_PIECE_CHARACTERS = 1 << 16  # tokenized at a time; more than most rows have


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of plain text, without the tokens that a tokenizer adds around it.

    A long text is tokenized in pieces, cut at line breaks or blanks where it has any. Elsewhere a
    cut can make one token more or less.
    """
    first, *others = _pieces(text)
    ids = _encode(tokenizer, first)
    if not others:
        return ids
    # Each id is one object, however often it occurs.
    known: dict[int, int] = {}
    ids = [known.setdefault(number, number) for number in ids]
    for piece_ids in _ids_of_rest(tokenizer, others, _encode):
        ids += [known.setdefault(number, number) for number in piece_ids]
    return ids


def token_ids_of_parts(tokenizer: Any, parts: Sequence[str]) -> list[int]:
    """Return the ids of a text in parts, which no token may join."""
    first, *others = parts
    ids = token_ids(tokenizer, first)
    for part_ids in _ids_of_rest(tokenizer, others, token_ids):
        ids += part_ids
    return ids


def _ids_of_rest(
    tokenizer: Any, parts: list[str], encode: Callable[[Any, str], list[int]]
) -> Iterator[list[int]]:
    """Yield the ids of each part that follows another one.

    They are those behind a line break, as some tokenizers put a blank before a text's first word.
    """
    line_break = _encode(tokenizer, "\n") if parts else []
    for part in parts:
        both = encode(tokenizer, f"\n{part}")
        is_apart = both[: len(line_break)] == line_break
        yield both[len(line_break) :] if is_apart else encode(tokenizer, part)


def _encode(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: rows that are too long are reported by `tokenize_rows`.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces that end behind a line break, or before a blank."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start + 1, limit)
        end = end if end > start else limit
        yield text[start:end]
        start = end
    yield text[start:]
