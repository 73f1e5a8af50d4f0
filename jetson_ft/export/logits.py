"""The largest difference of logits between an adapter on its base and the merged model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft import adapter
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat

ROWS, ROW_TOKENS, POSITIONS = 8, 128, 64  # at most: rows, tokens and compared positions of each

# Of the mean difference, as a share of the logits' spread. Measured on SmolLM2-135M: bf16 0.025,
# fp16 0.001. bf16 keeps 8 significant bits of a weight, fp16 11, fp32 24.
_BOUNDS = {"fp32": 0.001, "fp16": 0.0125, "bf16": 0.1}


@dataclass(frozen=True)
class LogitDifference:
    """How far the merged model's logits are from the adapter's."""

    largest: float
    mean: float  # absolute, over all logits
    spread: float  # standard deviation of the adapter's logits, mean over the positions
    same_token: int  # positions at which both prefer the same token
    positions: int
    rows: int
    precision: str  # of the arithmetic: fp32, bf16, fp16

    @property
    def relative(self) -> float:
        """The mean difference as a share of the spread."""
        return self.mean / self.spread if self.spread else self.mean


def bound(dtype: str, precision: str) -> float:
    """Return the relative difference that the rounding of weights and arithmetic explains."""
    return max(_BOUNDS[dtype], _BOUNDS[precision])


def bytes_on_disk(vocabulary: int) -> int:
    """Return the bytes of the temporary file of `logit_difference`."""
    return ROWS * POSITIONS * vocabulary * 4


def logit_difference(
    base: BaseModelFiles,
    adapter_dir: Path,
    merged: Path,
    rows: Sequence[Sequence[int]],
    precision: str,
    device: str,
    scratch: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LogitDifference:
    """Compare the logits at the last positions of some rows, evenly spread.

    One model is in memory at a time; the first one's logits are kept in a file.

    Args:
        merged: the folder that `merge_adapter` wrote.
        rows: token ids.
        precision: of the arithmetic; fp32 shows the rounding of the merged weights alone.
        scratch: where the temporary file is made.
    """
    import numpy as np

    count = min(ROWS, len(rows))
    chosen = [list(rows[number * len(rows) // count])[:ROW_TOKENS] for number in range(count)]
    positions = sum(min(POSITIONS, len(ids)) for ids in chosen)
    weights = WeightFormat(precision)
    model = adapter.load_adapter(loading.load_model(base, weights, device), base, adapter_dir)
    path = scratch / "logits"
    stored: Any = None
    place = 0
    for number, ids in enumerate(chosen):
        on_progress(number, 2 * count)
        logits = _last_logits(model, ids)
        if stored is None:
            shape = positions, logits.shape[1]
            with open(path, "wb") as file:
                # A mapped file that the disk has no room for would end the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, 4 * positions * logits.shape[1])
            stored = np.memmap(path, np.float32, "r+", shape=shape)
        stored[place : place + len(logits)] = logits
        place += len(logits)
    del model
    model = loading.load_model(BaseModelFiles(str(merged), merged), weights, device)
    largest, total, spread, same, place = 0.0, 0.0, 0.0, 0, 0
    for number, ids in enumerate(chosen):
        on_progress(count + number, 2 * count)
        logits = _last_logits(model, ids)
        reference = stored[place : place + len(logits)]
        difference = np.abs(logits - reference)
        largest = max(largest, float(difference.max()))
        total += float(difference.sum(dtype=np.float64))
        spread += float(reference.std(axis=1).sum())
        same += int((logits.argmax(1) == reference.argmax(1)).sum())
        place += len(logits)
    on_progress(2 * count, 2 * count)
    mean = total / stored.size
    del stored
    path.unlink()
    spread /= positions
    return LogitDifference(largest, mean, spread, same, positions, count, precision)


def _last_logits(model: Any, ids: list[int]) -> Any:
    """Return the logits at the row's last positions as an fp32 array: [positions, vocabulary]."""
    import torch

    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.device)
        kept = min(POSITIONS, len(ids))
        logits = model(input_ids=inputs, logits_to_keep=kept, use_cache=False).logits
    return logits[0, -kept:].float().cpu().numpy()
