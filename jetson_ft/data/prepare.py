"""Prepare a run's data: read, split and tokenize the rows; every step is cached by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jetson_ft.data import store, tokenize
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


def prepare_rows(data: DataRecipe, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    """Return the training and held-out rows as token ids.

    Raises:
        UserError: the data can't be read or split, or no row is usable.
    """
    train, heldout, split = store.split_rows(data)
    # Equal for two runs that train and evaluate on the same rows.
    parts = [
        split.train.sha256, split.heldout.sha256 if split.heldout else data.heldout,
        data.format, data.encoding, data.on_invalid, data.columns.chosen(),
    ]  # fmt: skip
    if data.chat_template:  # of a file, which may change
        parts.append(str(tokenizer.chat_template))
    sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    key = f"{split.train.cache_key}-{split.heldout.cache_key if split.heldout else data.heldout}"
    train_ids, train_report = tokenize.tokenize_rows(
        train, f"{key}-train", tokenizer, data.max_length, data.truncation, data.on_invalid,
        data.train,
    )  # fmt: skip
    heldout_ids, heldout_report = tokenize.tokenize_rows(
        heldout, f"{key}-heldout", tokenizer, data.max_length, on_invalid=data.on_invalid,
        source=split.heldout_from,
    )  # fmt: skip
    kept = set(heldout_ids["row"])
    indices = [index for index, number in enumerate(heldout["row"]) if number in kept]
    return PreparedRows(
        tokenizer=tokenizer,
        train=train_ids,
        heldout=heldout_ids,
        heldout_messages=heldout.select(indices),
        report={
            "sha256": sha256,
            "train": asdict(train_report),
            "heldout": asdict(heldout_report),
            "read": asdict(split),
        },
    )
