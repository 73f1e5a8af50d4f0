"""Prepare a run's data: read, split and tokenize the rows; every step is cached by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jetson_ft.data import split, tokenize
from jetson_ft.data.split import SourcePart
from jetson_ft.data.tokenize import TokenReport
from jetson_ft.errors import Message, _
from jetson_ft.recipe import DataRecipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedRows:
    """A run's rows, tokenized, and the report for data.json and report.json."""

    tokenizer: Any
    train: Dataset
    heldout: Dataset
    heldout_messages: Dataset
    report: dict[str, Any]

    @property
    def heldout_characters(self) -> int:
        """Characters of all held-out answers."""
        return int(sum(self.heldout["answer_characters"]))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(tokenize.token_counts(part).max()) for part in (self.train, self.heldout))

    def source_table(self) -> list[dict[str, Any]]:
        """Return each training source's name and its numbers of rows and tokens."""
        keys = "name", "rows", "tokens", "heldout_rows", "repeated"
        return [
            {key: part[key] for key in keys} | {"rows_read": part["read"]["rows_read"]}
            for part in self.report["read"]["sources"]
        ]


def prepare_rows(data: DataRecipe, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    """Return the training and held-out rows as token ids.

    Raises:
        UserError: the data can't be read or split, or no row is usable.
    """
    train, heldout, info = split.split_rows(data)
    parts = [*info.sources, *info.heldout]
    limits = [(item.share, item.rows) for item in data.sources()]
    # Equal for two runs that train and evaluate on the same rows.
    settings: list[Any] = [
        [part.read.sha256 for part in info.sources], limits,
        [part.read.sha256 for part in info.heldout] or data.heldout,
        data.format, data.encoding, data.on_invalid, data.columns.chosen(),
    ]  # fmt: skip
    if data.chat_template:  # of a file, which may change
        settings.append(str(tokenizer.chat_template))
    sha256 = _sha256_of(settings)
    key = _sha256_of([[part.read.cache_key for part in parts], limits, data.heldout])
    train_ids, train_report = tokenize.tokenize_rows(
        train, f"{key}-train", tokenizer, data.max_length, data.truncation, data.on_invalid,
        data.train_names(), partial(split.row_place, parts=info.sources),
    )  # fmt: skip
    heldout_ids, heldout_report = tokenize.tokenize_rows(
        heldout, f"{key}-heldout", tokenizer, data.max_length, on_invalid=data.on_invalid,
        source=info.heldout_from, place=partial(split.row_place, parts=parts),
    )  # fmt: skip
    kept = set(heldout_ids["row"])
    indices = [index for index, number in enumerate(heldout["row"]) if number in kept]
    count_tokens(train_ids, info.sources)
    return PreparedRows(
        tokenizer=tokenizer,
        train=train_ids,
        heldout=heldout_ids,
        heldout_messages=heldout.select(indices),
        report={
            "sha256": sha256,
            "train": asdict(train_report),
            "heldout": {**asdict(heldout_report), "notices": _heldout_notices(heldout_report)},
            "read": asdict(info),
        },
    )


def _heldout_notices(report: TokenReport) -> list[dict[str, Any]]:
    """Return the notices of held-out rows, which name them so, and those on rows dropped.

    The comparison, and the choice of the best checkpoint, depend on the rows that are left.
    """
    rows = report.rows + sum(report.dropped.values())
    messages = [
        Message(
            _("{count} of {rows} held-out rows are not used: {reason}."),
            {"count": count, "rows": rows, "reason": Message(reason)},
        )
        for reason, count in report.dropped.items()
        if reason != tokenize.REFUSED  # these have a notice, with their places
    ]
    for notice in report.notices:
        values = {"notice": Message.from_json(notice)}
        messages.append(Message(_("Held-out rows: {notice}"), values))
    return [message.as_json() for message in messages]


def _sha256_of(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def count_tokens(encoded: Dataset, parts: list[SourcePart]) -> None:
    """Set the rows and tokens of each source as they are after the encoding."""
    numbers = encoded.with_format("numpy")["row"][:]
    lengths = tokenize.token_counts(encoded)
    for part in parts:
        is_own = (numbers > part.first) & (numbers <= part.first + part.read.rows_read)
        part.rows = len(np.unique(numbers[is_own]))
        part.tokens = int(lengths[is_own].sum())
