"""Merge an adapter into its unquantised base model: a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jetson_ft.models.files import BaseModelFiles

MergeProgress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True)
class MergeInfo:
    """What `merge_adapter` wrote."""

    dtype: str  # bf16, fp16, fp32
    bytes: int  # of the weights
    parameters: int
    tied: bool  # whether the head is the embedding


def merge_adapter(
    base: BaseModelFiles, adapter_dir: Path, out: Path, dtype: str, on_progress: MergeProgress
) -> MergeInfo:
    """Write the merged model with tokenizer, chat template and configs into the folder `out`."""
    raise NotImplementedError
