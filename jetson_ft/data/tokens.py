"""Rows of messages to rows of token ids, kept in Arrow files and made only once.

The cache key covers everything the ids depend on: the rows, the tokenizer with its
template, and the length rule. Memory stays bounded: rows are read and written in batches.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jetson_ft.data.formats import Message
from jetson_ft.data.template import ANSWER, encode
from jetson_ft.errors import UserError
from jetson_ft.paths import cache_dir, disk_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_VERSION = 3  # grows when the columns or the encoding change
KEPT, TOO_LONG, NO_ANSWER_LEFT = 0, 1, 2
_REASONS = {TOO_LONG: "longer than max_length", NO_ANSWER_LEFT: "no answer within max_length"}


@dataclass(frozen=True)
class TokenReport:
    """What the rows weigh under one tokenizer. Lengths in tokens."""

    rows: int
    dropped: dict[str, int]
    tokens: int  # of the rows kept, after cutting
    supervised_tokens: int
    tokens_per_character: float
    lengths: dict[str, int]  # before cutting: p50, p90, p99, max
    truncated: int  # rows cut at max_length
    from_cache: bool

    def as_json(self) -> dict[str, Any]:
        """For `report.json` and `data inspect --json`."""
        return asdict(self)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash over vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    text = json.dumps(
        [model, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def tokenise(
    rows: Dataset,
    rows_sha256: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    over_length: str = "truncate",
) -> tuple[Dataset, TokenReport]:
    """Encodes `rows` (columns row, messages).

    Returns:
        A data set with columns row, input_ids (int32), parts (uint8), answer_characters
        and the report about it.

    Raises:
        UserError: no row is left, or the template refuses one.
    """
    key = _key(rows_sha256, tokenizer, max_length, over_length)
    path = cache_dir("tokens") / f"{key}.arrow"
    with disk_errors(path):
        cached = _cached(path, len(rows))
        encoded = cached or rows.map(
            lambda batch: _encode_batch(batch, tokenizer, max_length, over_length),
            batched=True,
            batch_size=256,
            remove_columns=["messages"],
            cache_file_name=str(path),
            new_fingerprint=key[:32],
            features=_features(),
            desc="tokenise",
        )
    report = _report(encoded, from_cache=cached is not None)
    kept = np.flatnonzero(_column(encoded, "status") == KEPT)
    if not len(kept):
        raise UserError(
            "No row is left to learn from.",
            f"data.max_length = {max_length}",
            f"Raise it (the rows have {report.lengths['p50']} tokens in the median), or write "
            "data.over_length: truncate.",
        )
    return encoded.select(kept) if len(kept) < len(encoded) else encoded, report


def _cached(path: Path, rows: int) -> Dataset | None:
    """What an earlier start wrote; removed where a power cut spoilt it."""
    import pyarrow as pa
    from datasets import Dataset

    if not path.exists():
        return None
    try:
        found = Dataset.from_file(str(path))
    except (pa.ArrowException, OSError):
        found = None
    if found is None or len(found) != rows:
        path.unlink()
        return None
    return found


def token_counts(encoded: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each row, without touching the ids themselves."""
    return _column(encoded, "length").astype(np.int64)


def supervised_counts(encoded: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Supervised tokens of each row."""
    return _column(encoded, "supervised").astype(np.int64)


def _column(encoded: Dataset, name: str) -> np.ndarray[Any, Any]:
    return np.asarray(encoded.with_format("numpy")[name][:])


def _key(rows_sha256: str, tokenizer: Any, max_length: int, over_length: str) -> str:
    parts = [_VERSION, rows_sha256, tokenizer_sha256(tokenizer), max_length, over_length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        {
            "row": Value("int64"),
            "input_ids": List(Value("int32")),
            "parts": List(Value("uint8")),
            "length": Value("int32"),
            "supervised": Value("int32"),
            "full_length": Value("int32"),
            "characters": Value("int32"),
            "answer_characters": Value("int32"),
            "status": Value("int8"),
        }
    )


def _encode_batch(
    batch: dict[str, list[Any]], tokenizer: Any, max_length: int, over_length: str
) -> dict[str, list[Any]]:
    names = [name for name in _features() if name != "row"]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for messages in batch["messages"]:
        for name, value in _encode_row(messages, tokenizer, max_length, over_length).items():
            columns[name].append(value)
    return {"row": batch["row"], **columns}


def _encode_row(
    messages: list[Message], tokenizer: Any, max_length: int, over_length: str
) -> dict[str, Any]:
    encoded = encode(tokenizer, messages)
    full_length = len(encoded.ids)
    ids, parts = encoded.ids[:max_length], encoded.parts[:max_length]
    status = KEPT
    if full_length > max_length and over_length == "drop":
        status = TOO_LONG
    elif ANSWER not in parts:
        status = NO_ANSWER_LEFT
    return {
        "input_ids": ids,
        "parts": parts,
        "length": len(ids),
        "supervised": sum(1 for part in parts[1:] if part),  # nothing predicts a first token
        "full_length": full_length,
        "characters": sum(len(message["content"]) for message in messages),
        "answer_characters": encoded.characters if full_length <= max_length else _characters(
            tokenizer, ids, parts
        ),
        "status": status,
    }  # fmt: skip


def _characters(tokenizer: Any, ids: list[int], parts: list[int]) -> int:
    """Characters of the answer tokens that a cut row kept."""
    kept = [i for i, part in zip(ids, parts, strict=True) if part == ANSWER]
    return len(tokenizer.decode(kept).rstrip("\ufffd"))


def _report(encoded: Dataset, from_cache: bool) -> TokenReport:
    status, full = _column(encoded, "status"), _column(encoded, "full_length")
    kept = status == KEPT
    characters = int(_column(encoded, "characters").sum())
    return TokenReport(
        rows=int(kept.sum()),
        dropped={
            reason: int((status == code).sum())
            for code, reason in _REASONS.items()
            if (status == code).any()
        },
        tokens=int(_column(encoded, "length")[kept].sum()),
        supervised_tokens=int(_column(encoded, "supervised")[kept].sum()),
        tokens_per_character=round(float(full.sum()) / max(1, characters), 3),
        lengths={
            **{f"p{p}": int(np.percentile(full, p)) for p in (50, 90, 99)},
            "max": int(full.max()),
        },
        truncated=int(((full > _column(encoded, "length")) & kept).sum()),
        from_cache=from_cache,
    )
