"""Cross-entropy of packed rows: for training, and as a score of the held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jetson_ft.models import attention
from jetson_ft.models.packing import Pack

if TYPE_CHECKING:
    import torch


def token_losses(model: Any, pack: Pack) -> torch.Tensor:
    """Loss of each supervised token, [S] in nats, fp32.

    Only positions whose next token is learnt are projected to the vocabulary.
    """
    from torch.nn.functional import cross_entropy

    bounds = {}
    if model.config._attn_implementation == attention.NAME:
        bounds["cu_seq_lens_q"] = pack.cu_seq_lens
    elif len(pack.cu_seq_lens) > 2:
        raise ValueError("several rows in a pack need packed attention, or they see each other")
    logits = model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        logits_to_keep=pack.positions,
        use_cache=False,
        **bounds,
    ).logits[0]
    return cross_entropy(logits.float(), pack.targets, reduction="none")


@dataclass(frozen=True)
class Score:
    """How well a model predicts given answers; the end token is in neither figure."""

    loss: float  # nats per answer token
    bits_per_char: float  # bits per character of the answers


def score(model: Any, packs: Iterable[Pack], characters: int) -> Score:
    """Teacher-forced score over packs whose answers have `characters` characters in all."""
    import torch

    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        for pack in packs:
            losses = token_losses(model, pack.to(device))
            answer = pack.is_answer.to(device)
            nats += float(losses[answer].double().sum())
            tokens += int(answer.sum())
    model.train(was_training)
    return Score(nats / max(1, tokens), nats / math.log(2) / max(1, characters))
