"""What is in a recipe's data: the rows of its sources, their tokens, and some rows to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

from jetson_ft.data import lengths, split, tokenize
from jetson_ft.data.chat_template import CONTEXT, encode
from jetson_ft.data.formats import TEXT, ChatMessage
from jetson_ft.data.lengths import LengthHistogram
from jetson_ft.data.prepare import count_tokens
from jetson_ft.data.split import TakenRows
from jetson_ft.models import files, loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import DataRecipe

PreviewSegments = list[tuple[str, bool]]  # text, and whether it is trained on


@dataclass(frozen=True)
class Inspection:
    """The report of reading the sources of rows, and some rows as a model reads them."""

    sources: list[dict[str, Any]]  # `data.split.SourcePart`
    model: str
    max_length: int
    tokens: dict[str, Any]  # `data.tokenize.TokenReport`; empty: estimated, without a tokenizer
    histogram: LengthHistogram
    conversations: list[list[ChatMessage]]  # some rows, evenly spread
    previews: list[PreviewSegments]  # the same rows as tokens; empty without a tokenizer


def inspect_data(
    data: DataRecipe, model: str = "embedded", samples: int = 3, base: BaseModelFiles | None = None
) -> Inspection:
    """Read and tokenize every row; unusable ones are counted, not refused.

    Args:
        model: the one whose tokenizer is used.
        samples: number of rows to preview.
        base: the model's files, where they are resolved already.
    """
    taken = _read(data)
    base = base or files.resolve_model(model, weights=False)
    return _inspect(data, model, taken, samples, loading.load_tokenizer(base, data.chat_template))


def inspect_without_tokenizer(
    data: DataRecipe, model: str, vocabulary: int, samples: int = 3
) -> Inspection:
    """Read every row; estimate its tokens from its characters for a vocabulary of that size."""
    return _inspect(data, model, _read(data), samples, None, vocabulary)


def _read(data: DataRecipe) -> list[TakenRows]:
    return split.read_training(data.model_copy(update={"on_invalid": "skip"}))


def _inspect(
    data: DataRecipe, model: str, taken: list[TakenRows], samples: int, tokenizer: Any,
    vocabulary: int = 0,
) -> Inspection:  # fmt: skip
    parts = [source.part for source in taken]
    rows = split.join_rows(taken)
    usable: Sequence[int] = range(len(rows))
    report: dict[str, Any] = {}
    if tokenizer:
        keys = [part.read.cache_key for part in parts], [str(item) for item in data.sources()]
        encoded, token_report = tokenize.tokenize_rows(
            rows, json.dumps(keys), tokenizer, data.max_length, on_invalid="skip",
            source=data.train_names(), place=partial(split.row_place, parts=parts),
        )  # fmt: skip
        count_tokens(encoded, parts)
        kept = set(encoded["row"])
        usable = [index for index, number in enumerate(rows["row"]) if number in kept]
        histogram, report = lengths.measure_lengths(encoded), asdict(token_report)
    else:
        for part, source in zip(parts, taken, strict=True):
            part.rows = len(source)
        histogram = lengths.estimate_lengths(rows["messages"], vocabulary, data.max_length)
    samples = min(samples, len(usable))
    chosen = [rows[usable[number * len(usable) // samples]] for number in range(samples)]
    return Inspection(
        sources=[asdict(part) for part in parts],
        model=model,
        max_length=data.max_length,
        tokens=report,
        histogram=histogram,
        conversations=[row["messages"] for row in chosen],
        previews=[
            preview_segments(tokenizer, row["messages"], row.get("tools") or "", data.max_length)
            for row in chosen
            if tokenizer
        ],
    )


def preview_segments(
    tokenizer: Any, messages: list[ChatMessage], tools: str = "", max_length: int | None = None
) -> PreviewSegments:
    """Return a row as the model reads it: stretches of text, trained on or context.

    Args:
        max_length: tokens after which a document ends; None: no limit.
    """
    encoded = encode(tokenizer, messages, tools)
    limit = max_length if messages[0]["role"] == TEXT else None
    tokens = list(zip(encoded.ids, encoded.segments, strict=True))[:limit]
    return [
        (tokenizer.decode([token for token, _segment in group]), is_trained)
        for is_trained, group in groupby(tokens, key=lambda pair: pair[1] != CONTEXT)
    ]
