"""Tokenize rows of messages into Arrow files in the cache.

A conversation is a row of tokens; a document that is longer than `max_length` becomes several.
The cache key has everything that the ids depend on: the rows, the tokenizer with its template,
`max_length` and `truncation`. Memory is bounded: rows are read and written in batches.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jetson_ft.data.chat_template import ANSWER, Encoded, encode_all
from jetson_ft.data.formats import TEXT, ChatMessage
from jetson_ft.data.store import open_arrow
from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.files import cache_dir, disk_errors, staging_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_VERSION = 7  # increase when the columns or the encoding change
_COUNTS = (
    "length", "supervised", "full_length", "characters", "answer_characters", "context_answers",
    "system_dropped", "control_texts", "pieces_left",
)  # fmt: skip
_COLUMNS = ("row", "input_ids", "segments", *_COUNTS, "dropped")
_REASONS = {"long": _("longer than max_length"), "no answer": _("no answer within max_length")}
REFUSED = _("refused by the chat template")
_BATCH_ROWS = 16  # encoded before they are written; a document can be long
_MAX_PLACES = 20  # named of the rows that are refused for one reason


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
    split: int  # documents longer than max_length, which are split into several rows
    context_answers: int  # answers only read, because the chat template rewrites earlier turns
    systems_dropped: int  # rows whose system message the chat template doesn't render
    control_rows: int  # rows whose text spells out control tokens
    control_texts: int  # control tokens that the text of these rows spells out
    notices: list[dict[str, Any]]  # these, and refused rows, in words; by `Message.as_json`
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
    on_invalid: str = "error",
    source: str = "",
    place: Callable[[int], Message] = lambda number: Message(_("row {row}"), {"row": number}),
) -> tuple[Dataset, TokenReport]:
    """Encode `rows` (columns row, messages, perhaps tools), identified in the cache by `rows_key`.

    Args:
        on_invalid: a row that the chat template refuses: `error`, or `skip` and count it.
        source: where the rows are from, for errors.
        place: returns a row's place by its number, for errors.

    Returns:
        The rows kept, with the columns row, input_ids (int32), segments (uint8), length,
        supervised (tokens trained on), answer_characters; and the report about them.

    Raises:
        UserError: no row is kept, or the template refuses one and `on_invalid` is `error`.
    """
    from datasets import Dataset, Features, List, Value

    parts = [_VERSION, rows_key, _tokenizer_sha256(tokenizer), max_length, truncation]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = cache_dir("tokens") / f"{key}.arrow"
    features = Features(
        row=Value("int64"),
        input_ids=List(Value("int32")),
        segments=List(Value("uint8")),
        **dict.fromkeys(_COUNTS, Value("int32")),
        dropped=Value("string"),
    )
    with disk_errors(path):
        cached = open_arrow(path)
        # The number of pieces is not known: a file is whole if it ends with the last row's last.
        if not cached or (cached[-1]["row"], cached[-1]["pieces_left"]) != (rows[-1]["row"], 0):
            cached = None
            path.unlink(missing_ok=True)
            # After an error datasets may leave a file of a random name.
            with staging_folder(path) as staging:
                rows.map(
                    lambda batch: _encode_batch(batch, tokenizer, max_length, truncation),
                    batched=True,
                    batch_size=_BATCH_ROWS,
                    remove_columns=rows.column_names,
                    cache_file_name=str(staging / path.name),
                    new_fingerprint=key[:32],
                    features=features,
                    writer_batch_size=256,
                    desc="tokenize",
                )
                (staging / path.name).replace(path)
        encoded = cached or Dataset.from_file(str(path))
    reasons = np.asarray(encoded["dropped"][:], dtype=object)
    kept = np.flatnonzero(reasons == "")
    refused = [i for i, reason in enumerate(reasons) if reason and reason not in _REASONS]
    refusals = _refusals(encoded, refused, place)
    if refused and (on_invalid == "error" or not len(kept)):
        path.unlink()
        raise UserError(
            _("{count} of {rows} rows can't be encoded:\n  - {refusals}"),
            source,
            _(
                "Fix the rows, leave them out with `--set data.on_invalid=skip`, or set "
                "`data.chat_template` to another template, such as `chatml`."
            ),
            count=len(refused),
            rows=len(encoded),
            refusals=joined(refusals, "\n  - "),
        )
    report = _report(encoded, reasons, refusals, from_cache=cached is not None)
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


def _refusals(
    encoded: Dataset, refused: list[int], place: Callable[[int], Message]
) -> list[Message]:
    """Return the reasons why the chat template refuses rows, with the numbers of the rows."""
    places: dict[str, list[Message]] = {}
    for index in refused:
        row = encoded[index]
        places.setdefault(row["dropped"], []).append(place(row["row"]))
    messages = []
    for reason, listed in places.items():
        more = [Message("…")] if len(listed) > _MAX_PLACES else []
        values = {
            "count": len(listed),
            "places": joined([*listed[:_MAX_PLACES], *more], ", "),
            "reason": Message.from_json(json.loads(reason)),
        }
        messages.append(Message(_("refused: {count} ({places}): {reason}"), values))
    return messages


def _encode_batch(
    batch: dict[str, list[Any]], tokenizer: Any, max_length: int, truncation: str
) -> dict[str, list[Any]]:
    """Return the columns of the rows in a batch."""
    result: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = [(row["messages"], row.get("tools") or "") for row in rows]
    for row, encoded in zip(rows, encode_all(tokenizer, pairs), strict=True):
        if isinstance(encoded, Encoded) and row["messages"][0]["role"] == TEXT:
            pieces = list(_document_columns(row, encoded, max_length))
        else:
            pieces = [_conversation_columns(row, encoded, tokenizer, max_length, truncation)]
        for piece in pieces:
            for name, column in result.items():
                column.append(piece[name])
    return result


def _document_columns(
    row: dict[str, Any], whole: Encoded, max_length: int
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each piece of a document; pieces are of about equal length."""
    length = len(whole.ids)
    count = -(-length // max_length)
    for number in range(count):
        start, end = (length * n // count for n in (number, number + 1))
        segments = whole.segments[start:end]
        characters = whole.characters * end // length - whole.characters * start // length
        yield {
            "row": row["row"],
            "input_ids": whole.ids[start:end],
            "segments": segments,
            "length": end - start,
            "supervised": sum(map(bool, segments[1:])),
            "full_length": end - start,
            "characters": characters,
            "answer_characters": characters,
            "context_answers": 0,
            "system_dropped": False,
            "control_texts": whole.control_texts if number == 0 else 0,
            "pieces_left": count - 1 - number,
            "dropped": "",
        }


def _conversation_columns(
    row: dict[str, Any],
    encoded: Encoded | UserError,
    tokenizer: Any,
    max_length: int,
    truncation: str,
) -> dict[str, Any]:
    """Return the row's columns; `dropped`: why it is not kept, of `_REASONS` or a message."""
    messages: list[ChatMessage] = row["messages"]
    tools = row.get("tools") or ""
    dropped = ""
    if isinstance(encoded, UserError):
        dropped, encoded = json.dumps(encoded.what.as_json()), Encoded()
    ids, segments = encoded.ids[:max_length], encoded.segments[:max_length]
    characters = encoded.characters
    if not dropped and ANSWER not in segments:
        dropped = "no answer"
    if len(encoded.ids) > max_length:
        kept = [i for i, segment in zip(ids, segments, strict=True) if segment == ANSWER]
        characters = len(tokenizer.decode(kept).rstrip("\ufffd"))
        if truncation == "drop":
            dropped = "long"
    texts = [message["content"] + str(message.get("tool_calls") or "") for message in messages]
    return {
        "row": row["row"],
        "input_ids": ids,
        "segments": segments,
        "length": len(ids),
        "supervised": sum(map(bool, segments[1:])),  # a first token is not predicted
        "full_length": len(encoded.ids),
        "characters": sum(map(len, texts)) + len(tools),
        "answer_characters": characters,  # of the tokens that are left
        "context_answers": encoded.context_answers,
        "system_dropped": encoded.system_dropped,
        "control_texts": encoded.control_texts,
        "pieces_left": 0,
        "dropped": dropped,
    }


def _report(
    encoded: Dataset, reasons: np.ndarray[Any, Any], refusals: list[Message], from_cache: bool
) -> TokenReport:
    column = {name: _column(encoded, name) for name in _COUNTS}
    kept = reasons == ""
    is_encoded = column["full_length"] > 0
    full, length = column["full_length"][is_encoded], column["length"]
    dropped = Counter(_REASONS.get(reason, REFUSED) for reason in reasons if reason)
    percentiles = {f"p{share}": int(np.percentile(full, share)) for share in (50, 90, 99)}
    context, systems, control = (
        column[name][kept] for name in ("context_answers", "system_dropped", "control_texts")
    )
    counts = {
        "context_answers": int(context.sum()),
        "systems_dropped": int(systems.sum()),
        "control_rows": int((control > 0).sum()),
        "control_texts": int(control.sum()),
    }
    return TokenReport(
        rows=int(kept.sum()),
        dropped=dict(dropped),
        tokens=int(length[kept].sum()),
        supervised_tokens=int(column["supervised"][kept].sum()),
        tokens_per_character=round(
            float(full.sum()) / max(1, int(column["characters"][is_encoded].sum())), 3
        ),
        lengths={**percentiles, "max": int(full.max())},
        split=len(np.unique(_column(encoded, "row")[column["pieces_left"] > 0])),
        truncated=int(((column["full_length"] > length) & kept).sum()),
        **counts,
        notices=[message.as_json() for message in [*refusals, *_notices(counts)]],
        from_cache=from_cache,
    )


def _notices(counts: dict[str, int]) -> Iterator[Message]:
    """Yield what a person should know about the rows that are kept."""
    if counts["context_answers"]:
        yield Message(
            _(
                "{context_answers} answers are read but not trained on: the chat template rewrites "
                "earlier turns. `data.chat_template: chatml` trains on every answer."
            ),
            counts,
        )
    if counts["systems_dropped"]:
        yield Message(
            _(
                "The system messages of {systems_dropped} rows are not used: the chat template "
                "leaves them out. `data.chat_template: chatml` keeps them."
            ),
            counts,
        )
    if counts["control_texts"]:
        yield Message(
            _(
                "{control_rows} rows spell out control tokens ({control_texts} in all), which are "
                "read as ordinary text."
            ),
            counts,
        )
