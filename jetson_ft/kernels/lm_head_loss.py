"""Cross-entropy of packed rows: for training, and as a score of the held-out rows.

`families.head_chunk_rows` says how many logits exist at one time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jetson_ft.kernels import attention
from jetson_ft.kernels.families import head_chunk_rows
from jetson_ft.kernels.packing import Pack


def token_losses(model: Any, pack: Pack) -> Tensor:
    """Return the loss of each supervised token, [S] in nats, fp32.

    Only positions whose next token is trained on are projected to the vocabulary; within
    `chunked_lm_head`, chunk by chunk.
    """
    from torch.nn.functional import cross_entropy

    rows: dict[str, Any] = {}
    if model.config._attn_implementation == attention.PACKED_ATTENTION:
        rows = {
            "position_ids": pack.position_ids,  # alone, a model numbers them as it was trained
            "row_lengths": pack.row_lengths,
            "shared_prefix": pack.shared_prefix,
        }
    elif len(pack.row_lengths) > 1:
        raise ValueError(
            "a pack of several rows needs packed attention: else rows attend to each other"
        )
    out = model(
        input_ids=pack.input_ids,
        logits_to_keep=pack.positions,
        use_cache=False,
        **rows,
    ).logits.squeeze(0)
    if len(out) == pack.tokens:  # a model without `logits_to_keep`
        out = out[pack.positions]
    head = model.get_output_embeddings()
    if getattr(head, _CHUNKED, False):
        return head_losses(out, head.weight, head.bias, pack.targets)
    return cross_entropy(out.float(), pack.targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """The cross-entropy, [S] in nats, of a frozen head's logits, never all in memory.

    Takes hidden [S, hidden size], weight [vocabulary, hidden size], bias [vocabulary] or None, and
    targets [S]. Computes the gradient softmax(logits) W - W[target] beside the loss.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size, softmax_rows = head_chunk_rows(len(weight), hidden.element_size(), hidden.device.type)
        # One buffer for all chunks: fresh memory costs as much as the product it receives.
        buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = torch.mm(hidden[chunk], weight.t(), out=buffer[: len(targets[chunk])])
            for row in range(0, len(logits), softmax_rows):
                part = slice(row, row + softmax_rows)
                _softmax_in_place(logits[part], bias, targets[chunk][part], losses[chunk][part])
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
                grad_hidden[chunk] -= weight[targets[chunk]]
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> Any:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * d_losses[:, None].to(grad_hidden.dtype), None, None, None


head_losses = _FrozenHead.apply


def _softmax_in_place(logits: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor) -> None:
    """Turn logits into their softmax, in place; write the losses of their rows to `losses`."""
    if bias is not None:
        logits.add_(bias)
    wide = logits.float()
    largest, wanted = wide.amax(-1), wide.gather(1, targets[:, None]).squeeze(1)
    probs = torch.softmax(wide, -1, out=wide)
    # logsumexp = max - log(largest probability), without another pass of exponentials.
    torch.sub(largest - probs.amax(-1).log_(), wanted, out=losses)
    if wide is not logits:
        logits.copy_(probs)


_CHUNKED = "_jetson_ft_chunked"


@contextmanager
def chunked_lm_head(model: Any) -> Iterator[None]:
    """Let the model return hidden states to `token_losses`, which applies the head in chunks.

    Do nothing for models whose logits aren't exactly their frozen head's output (scaled, capped).
    """
    head = model.get_output_embeddings()
    if not _returns_logits(model, head):
        yield
        return
    head.forward = lambda hidden: hidden
    setattr(head, _CHUNKED, True)
    try:
        yield
    finally:
        delattr(head, _CHUNKED)
        del head.forward


def _returns_logits(model: Any, head: Any) -> bool:
    """Return whether the model's logits are exactly its frozen head's output, by a trial."""
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return False
    ids = torch.tensor([[3 % head.out_features, 5 % head.out_features]], device=head.weight.device)
    outputs: list[Tensor] = []
    hook = head.register_forward_hook(lambda _head, _inputs, output: outputs.append(output))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    return len(outputs) == 1 and torch.equal(outputs[0], logits)


@dataclass(frozen=True)
class Score:
    """How well a model predicts given answers; the end token is in neither figure."""

    loss: float  # nats per answer token
    bits_per_char: float  # bits per character of the answers


def score_packs(
    model: Any,
    packs: Iterable[Pack],
    characters: int,
    all_reduce_sum: Callable[[Sequence[float]], list[float]] | None = None,
) -> Score:
    """Return the teacher-forced score over packs whose answers have `characters` characters.

    Where several processes score some packs each, `all_reduce_sum` sums nats and tokens.
    """
    nats, tokens = 0.0, 0.0
    for losses, _rows in _answer_losses(model, packs):
        nats += float(losses.sum())
        tokens += len(losses)
    if all_reduce_sum:
        nats, tokens = all_reduce_sum([nats, tokens])
    return Score(nats / max(1, tokens), nats / math.log(2) / max(1, characters))


def score_rows(model: Any, packs: Iterable[Pack], rows: int) -> tuple[list[float], list[int]]:
    """Return the nats and the answer tokens of each row, by its number in `Pack.target_rows`.

    Args:
        rows: number of rows; a row that is in no pack has 0 of both.
    """
    nats = torch.zeros(rows, dtype=torch.float64)
    tokens = torch.zeros(rows, dtype=torch.long)
    for losses, numbers in _answer_losses(model, packs):
        nats.index_add_(0, numbers, losses.cpu())
        tokens += torch.bincount(numbers, minlength=rows)
    return nats.tolist(), tokens.tolist()


def _answer_losses(model: Any, packs: Iterable[Pack]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the teacher-forced losses of a pack's answer tokens, fp64, and their rows' numbers."""
    was_training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    for pack in packs:
        with torch.no_grad():  # not inference_mode: FSDP reuses the gathered tensors in training
            losses = token_losses(model, pack.to(device))
        yield losses[pack.is_answer.to(device)].double(), pack.target_rows[pack.is_answer]
    model.train(was_training)
