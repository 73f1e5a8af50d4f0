"""Tokenize texts of any length in bounded memory.

A tokenizer's own result takes about 200 bytes for each token, 6 GB for a row of 30 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    line_break = _encode(tokenizer, "\n")
    for piece in others:
        # Behind a line break, as some tokenizers put a blank before the first word of a text.
        both = _encode(tokenizer, f"\n{piece}")
        is_apart = both[: len(line_break)] == line_break
        piece_ids = both[len(line_break) :] if is_apart else _encode(tokenizer, piece)
        ids += [known.setdefault(number, number) for number in piece_ids]
    return ids


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
