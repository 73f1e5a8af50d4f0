"""Tokenize rows of messages into Arrow files in the cache.

The cache key has everything that the ids depend on: the rows, the tokenizer with its template,
`max_length` and `truncation`. Memory is bounded: rows are read and written in batches.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jetson_ft.data.chat_template import ANSWER, encode
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.store import open_arrow
from jetson_ft.errors import UserError, _
from jetson_ft.files import cache_dir, disk_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_VERSION = 4  # increase when the columns or the encoding change
_COUNTS = ("length", "supervised", "full_length", "characters", "answer_characters")
# By `status`; the first one means that the row is kept.
_REASONS = ("", _("longer than max_length"), _("no answer within max_length"))
_KEPT, _TOO_LONG, _NO_ANSWER_LEFT = range(3)


@dataclass(frozen=True)
class TokenReport:
    """Counts and lengths of the rows under one tokenizer, in tokens."""

    rows: int
    dropped: dict[str, int]
    tokens: int  # of the rows kept, after truncation
    supervised_tokens: int
    tokens_per_character: float
    lengths: dict[str, int]  # before truncation: p50, p90, p99, max
    truncated: int  # rows truncated at max_length
    from_cache: bool


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [model, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenize_rows(
    rows: Dataset,
    rows_key: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str = "truncate",
) -> tuple[Dataset, TokenReport]:
    """Encode `rows` (columns row, messages), which `rows_key` identifies in the cache.

    Returns:
        The rows kept, with the columns row, input_ids (int32), segments (uint8), length,
        supervised (tokens trained on), answer_characters; and the report about them.

    Raises:
        UserError: no row is kept, or the template refuses one.
    """
    from datasets import Features, List, Value

    parts = [_VERSION, rows_key, _tokenizer_sha256(tokenizer), max_length, truncation]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = cache_dir("tokens") / f"{key}.arrow"
    features = Features(
        row=Value("int64"),
        input_ids=List(Value("int32")),
        segments=List(Value("uint8")),
        **dict.fromkeys(_COUNTS, Value("int32")),
        status=Value("int8"),
    )
    with disk_errors(path):
        cached = open_arrow(path, len(rows))
        if not cached:
            path.unlink(missing_ok=True)
        encoded = cached or rows.map(
            lambda row: _encode_row(row["messages"], tokenizer, max_length, truncation),
            remove_columns=[name for name in rows.column_names if name != "row"],
            cache_file_name=str(path),
            new_fingerprint=key[:32],
            features=features,
            writer_batch_size=256,
            desc="tokenize",
        )
    report = _report(encoded, from_cache=cached is not None)
    kept = np.flatnonzero(_column(encoded, "status") == _KEPT)
    if not len(kept):
        raise UserError(
            _("No row has an answer within max_length."),
            f"data.max_length = {max_length}",
            _("Raise it (the median row has {median} tokens), or set data.truncation to truncate.")
            if truncation == "drop"
            else _("Raise it (the median row has {median} tokens)."),
            median=report.lengths["p50"],
        )
    return encoded.select(kept) if len(kept) < len(encoded) else encoded, report


def token_counts(encoded: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the tokens of each row, without reading the ids."""
    return _column(encoded, "length").astype(np.int64)


def _column(encoded: Dataset, name: str) -> np.ndarray[Any, Any]:
    return np.asarray(encoded.with_format("numpy")[name][:])


def _encode_row(
    messages: list[ChatMessage], tokenizer: Any, max_length: int, truncation: str
) -> dict[str, Any]:
    encoded = encode(tokenizer, messages)
    ids, segments = encoded.ids[:max_length], encoded.segments[:max_length]
    characters, status = encoded.characters, _KEPT if ANSWER in segments else _NO_ANSWER_LEFT
    if len(encoded.ids) > max_length:
        kept = [i for i, segment in zip(ids, segments, strict=True) if segment == ANSWER]
        characters = len(tokenizer.decode(kept).rstrip("\ufffd"))
        if truncation == "drop":
            status = _TOO_LONG
    return {
        "input_ids": ids,
        "segments": segments,
        "length": len(ids),
        "supervised": sum(map(bool, segments[1:])),  # a first token is not predicted
        "full_length": len(encoded.ids),
        "characters": sum(len(message["content"]) for message in messages),
        "answer_characters": characters,  # of the tokens that are left
        "status": status,
    }


def _report(encoded: Dataset, from_cache: bool) -> TokenReport:
    status, full, length, supervised, characters = (
        _column(encoded, name)
        for name in ("status", "full_length", "length", "supervised", "characters")
    )
    kept = status == _KEPT
    percentiles = {f"p{share}": int(np.percentile(full, share)) for share in (50, 90, 99)}
    counts = {reason: int((status == code).sum()) for code, reason in enumerate(_REASONS) if code}
    return TokenReport(
        rows=int(kept.sum()),
        dropped={reason: count for reason, count in counts.items() if count},
        tokens=int(length[kept].sum()),
        supervised_tokens=int(supervised[kept].sum()),
        tokens_per_character=round(float(full.sum()) / max(1, int(characters.sum())), 3),
        lengths={**percentiles, "max": int(full.max())},
        truncated=int(((full > length) & kept).sum()),
        from_cache=from_cache,
    )
