"""What computes a comparison: a model in transformers, or a program that reads its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from jetson_ft.data.chat_template import end_ids
from jetson_ft.inference.generate import MAX_REPLY_BATCH, Reply, generate_replies
from jetson_ft.kernels import attention
from jetson_ft.kernels.lm_head_loss import chunked_lm_head, score_rows
from jetson_ft.kernels.packing import Pack, make_packs
from jetson_ft.models.positions import position_table_size

Progress = Callable[[int, int], None]  # (done, total)


class Reader(Protocol):
    """A model that scores rows and replies to prompts."""

    @property
    def name(self) -> str:
        """The program that computes, with its version."""

    @property
    def max_tokens(self) -> int | None:
        """Positions of a row; None: there is no limit."""

    def score(
        self, rows: Sequence[dict[str, Any]], progress: Progress
    ) -> tuple[list[float], list[int]]:
        """Return the nats and the number of the answer tokens of each row.

        Args:
            rows: `input_ids` and `segments` as `data.tokenize` writes them.
            progress: called with the tokens done and their number.
        """

    def reply(
        self, prompts: Sequence[list[int]], max_new_tokens: int, progress: Progress
    ) -> list[Reply]:
        """Return the greedy reply to each prompt (token ids).

        Args:
            progress: called with the replies done and their number.
        """


@dataclass(frozen=True)
class ModelReader:
    """A model in transformers.

    Args:
        pack_tokens: tokens of a pack of rows; 0: rows can't be packed.
        batch_size: as in `generate_replies`.
        is_base: disable the adapter of a PEFT model.
    """

    model: Any
    tokenizer: Any
    pack_tokens: int
    batch_size: Callable[[int], int] = lambda width: MAX_REPLY_BATCH
    is_base: bool = False

    @property
    def name(self) -> str:
        """Return transformers' name and version."""
        return f"transformers {version('transformers')}"

    @property
    def max_tokens(self) -> int | None:
        """Return the entries of the model's table of positions; None: it has no table."""
        return position_table_size(self.model)

    def score(
        self, rows: Sequence[dict[str, Any]], progress: Progress
    ) -> tuple[list[float], list[int]]:
        """Return the nats and the number of the answer tokens of each row."""
        packs = list(make_packs(rows, self.pack_tokens))

        def with_progress() -> Iterator[Pack]:
            # In tokens: the first packs hold few long rows and the last ones many short rows.
            done, total = 0, sum(pack.tokens for pack in packs)
            for pack in packs:
                progress(done, total)
                yield pack
                done += pack.tokens
            progress(done, total)

        packed = any(len(pack.row_lengths) > 1 for pack in packs)
        attention_mode = attention.use_packed_attention(self.model) if packed else nullcontext()
        with self._weights(), chunked_lm_head(self.model), attention_mode:
            return score_rows(self.model, with_progress(), len(rows))

    def reply(
        self, prompts: Sequence[list[int]], max_new_tokens: int, progress: Progress
    ) -> list[Reply]:
        """Return the greedy reply to each prompt, in batches."""
        with self._weights():
            return generate_replies(
                self.model, self.tokenizer, prompts, end_ids(self.tokenizer, self.model),
                max_new_tokens, progress, self.batch_size,
            )  # fmt: skip

    def _weights(self) -> Any:
        return self.model.disable_adapter() if self.is_base else nullcontext()
