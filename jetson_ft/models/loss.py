"""Cross-entropy of packed rows: for training, and as a score of the held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jetson_ft.models import attention
from jetson_ft.models.packing import Pack
from jetson_ft.models.shapes import head_rows


def token_losses(model: Any, pack: Pack) -> Tensor:
    """Loss of each supervised token, [S] in nats, fp32.

    Only positions whose next token is learnt are projected to the vocabulary; within
    `without_head`, chunk by chunk.
    """
    from torch.nn.functional import cross_entropy

    bounds: dict[str, Any] = {}
    if model.config._attn_implementation == attention.NAME:
        bounds = {"row_lengths": pack.row_lengths, "opening": pack.opening}
    elif len(pack.row_lengths) > 1:
        raise ValueError("several rows in a pack need packed attention, or they see each other")
    out = model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        logits_to_keep=pack.positions,
        use_cache=False,
        **bounds,
    ).logits.squeeze(0)
    head = model.get_output_embeddings()
    if getattr(head, _LEFT_OUT, False):
        return head_losses(out, head.weight, head.bias, pack.targets)
    return cross_entropy(out.float(), pack.targets, reduction="none")


def head_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy of a frozen head's logits that are never all in memory.

    Args:
        hidden: [S, hidden size]
        weight: [vocabulary, hidden size], frozen; bias [vocabulary] or None.
        targets: [S]

    Returns:
        [S], fp32, nats.
    """
    losses: Tensor = _FrozenHead.apply(hidden, weight, bias, targets)
    return losses


class _FrozenHead(torch.autograd.Function):
    """As the head is frozen, backward needs the gradient of the hidden states alone.

    Each row's loss depends on its own hidden state only, so that gradient,
    softmax(logits) W - W[target], is made beside the loss and scaled afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size, few = head_rows(len(weight), hidden.element_size(), hidden.device.type)
        # One buffer for all chunks: fresh memory costs as much as the product it receives.
        room = hidden.new_empty(min(size, len(hidden)), len(weight))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = torch.mm(hidden[part], weight.t(), out=room[: len(targets[part])])
            for row in range(0, len(logits), few):
                piece = slice(row, row + few)
                _to_chances(logits[piece], bias, targets[part][piece], losses[part][piece])
            if slopes is not None:
                torch.mm(logits, weight, out=slopes[part])
                slopes[part] -= weight[targets[part]]
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * d_losses[:, None].to(slopes.dtype), None, None, None


def _to_chances(logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor) -> None:
    """Turns logits into their softmax, in place; writes the losses of their rows."""
    if bias is not None:
        logits.add_(bias)
    wide = logits.float()
    largest, wanted = wide.amax(-1), wide.gather(1, targets[:, None]).squeeze(1)
    chances = torch.softmax(wide, -1, out=wide)
    # logsumexp = max - log(largest chance), without another pass of exponentials.
    torch.sub(largest - chances.amax(-1).log_(), wanted, out=losses)
    if wide is not logits:
        logits.copy_(chances)


_LEFT_OUT = "_jetson_ft_left_out"


@contextmanager
def without_head(model: Any) -> Iterator[None]:
    """Within it the model hands hidden states to `token_losses`, which applies the head itself.

    Only for models whose logits are their frozen head's output and nothing else (no scaling,
    no capping): tried with two tokens, not assumed.
    """
    head = model.get_output_embeddings()
    if not _is_all_of_the_logits(model, head):
        yield
        return
    _leave_out(head)
    try:
        yield
    finally:
        delattr(head, _LEFT_OUT)
        del head.forward


def _leave_out(head: Any) -> None:
    head.forward = lambda hidden: hidden
    setattr(head, _LEFT_OUT, True)


def _is_all_of_the_logits(model: Any, head: Any) -> bool:
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return False
    ids = torch.tensor([[3 % head.out_features, 5 % head.out_features]], device=head.weight.device)
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda *found: seen.append(found[2]))
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return len(seen) == 1 and torch.equal(seen[0], logits)


@dataclass(frozen=True)
class Score:
    """How well a model predicts given answers; the end token is in neither figure."""

    loss: float  # nats per answer token
    bits_per_char: float  # bits per character of the answers


def score(
    model: Any,
    packs: Iterable[Pack],
    characters: int,
    total: Callable[[Sequence[float]], list[float]] = list,
) -> Score:
    """Teacher-forced score over packs whose answers have `characters` characters in all.

    Args:
        total: adds other processes' nats and tokens, where each scores some of the packs.
    """
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0.0
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():  # not inference mode: split layers go on in training with its tensors
        for pack in packs:
            losses = token_losses(model, pack.to(device))
            answer = pack.is_answer.to(device)
            nats += float(losses[answer].double().sum())
            tokens += int(answer.sum())
    model.train(was_training)
    nats, tokens = total([nats, tokens])
    return Score(nats / max(1, tokens), nats / math.log(2) / max(1, characters))
