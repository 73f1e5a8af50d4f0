"""Prove on the loaded model that packed rows give what each row gives alone.

Attention that stays inside each row isn't enough: convolutions and recurrences carry numbers from
token to token too, and some models compute positions or masks in ways of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from jetson_ft.errors import Message, _
from jetson_ft.kernels.attention import PACKED_ATTENTION, PackingError, use_packed_attention
from jetson_ft.models.positions import max_positions

logger = logging.getLogger(__name__)

_FIRST, _SECOND, _PREFIX = 24, 16, 2  # tokens of the two rows, and of the prefix they share
# Mean relative difference of a token's logits that rounding explains. Measured on SmolLM2-135M:
# 8e-7, 0.0014, 0.017; int8 0.041, nf4 0.019. A row at another's positions differs by half and more.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.08}
_INT8_ROUNDING = 0.15
_NF4_ROUNDING = 0.08  # bitsandbytes' kernels on a CPU compute in bf16, whatever the model does


def packing_obstacle(model: Any, longest_row: int = 0) -> Message | None:
    """Return why rows of this model can't be packed; None: packed rows are right.

    Two trials with short rows, each in the model's own number formats:
    1. Nothing flows from a row to the next. The first row's embeddings are NaN, which no sum or
       product hides; the second row's logits must be finite.
    2. The logits of a row behind another, with which it shares a prefix, are its logits alone,
       within rounding. The other row's positions end at `longest_row`, the tokens of the longest
       row that will be packed: some rotary embeddings depend on it.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _try_packing(model, longest_row)
    finally:
        model.train(was_training)


def _try_packing(model: Any, longest_row: int) -> Message | None:
    embedding = model.get_input_embeddings().weight
    vocabulary, device = len(embedding), embedding.device
    # Special tokens are at the ends of most vocabularies.
    ids = torch.randint(
        vocabulary // 4, vocabulary - vocabulary // 4, (_FIRST + _SECOND,),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    positions = torch.cat((torch.arange(_FIRST), torch.arange(_SECOND)))
    last = max(_FIRST, min(longest_row, max_positions(model.config) or 0))
    far_positions = positions[:-_PREFIX].clone()
    far_positions[_PREFIX:_FIRST] += last - _FIRST
    far_positions[_FIRST:] += _PREFIX
    # The second row, then as many tokens as the first row has in the pack: under causal attention
    # they change nothing, and with as many tokens quantized layers round alike.
    tokens = torch.arange(len(far_positions))
    alone_first = torch.cat((tokens[:_PREFIX], tokens[_FIRST:], tokens[_PREFIX:_FIRST]))

    def logits(ids: Tensor, **packed: Any) -> Tensor:
        """Call the model as `lm_head_loss.token_losses` does."""
        keep = torch.arange(len(ids), device=device)
        result = model(
            input_ids=ids[None].to(device), logits_to_keep=keep, use_cache=False, **packed
        )  # fmt: skip
        return result.logits[0].float()

    try:
        with use_packed_attention(model):
            if model.config._attn_implementation != PACKED_ATTENTION:
                return Message(_("its attention can't be replaced"))
            with _nan_embeddings(model):
                rows = logits(
                    ids, position_ids=positions[None].to(device), row_lengths=[_FIRST, _SECOND],
                    one_by_one=True,
                )  # fmt: skip
            if not (rows[:_FIRST].isnan().all() and rows[_FIRST:].isfinite().all()):
                return Message(_("it carries numbers from token to token outside of attention"))
            rows = logits(
                ids[: len(far_positions)], position_ids=far_positions[None].to(device),
                row_lengths=[_FIRST, _SECOND], shared_prefix=_PREFIX,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except PackingError as error:
        text = _("its attention uses {arguments}, which attention of packed rows doesn't compute")
        return Message(text, {"arguments": error.arguments})
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        logger.debug("the model fails with packed rows: %r", error)
        return Message(_("its layers don't accept packed rows"))
    # Last: some rotary embeddings stay as the longest row needs them until a shorter one comes.
    alone = logits(ids[alone_first])[_PREFIX:_SECOND]
    difference = (rows[_FIRST:] - alone).norm(dim=-1) / alone.norm(dim=-1)
    logger.debug("logits of a packed row differ by %.2g", difference.mean())
    rounding = _ROUNDING.get(embedding.dtype, 0.0)
    if getattr(model, "is_loaded_in_8bit", False):
        rounding = max(rounding, _INT8_ROUNDING)
    if getattr(model, "is_loaded_in_4bit", False):
        rounding = max(rounding, _NF4_ROUNDING)
    # What comes from the row before affects a row's first tokens most. A NaN isn't below anything.
    if difference.mean() < rounding and difference[:3].mean() < rounding:
        return None
    return Message(_("a packed row doesn't give the logits of the row alone"))


@contextmanager
def _nan_embeddings(model: Any) -> Iterator[None]:
    """Make the embeddings of the first row's tokens NaN within the context."""

    def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if output.shape[:2] != (1, _FIRST + _SECOND):  # of positions, which rows share
            return output
        output = output.clone()
        output[:, :_FIRST] = torch.nan
        return output

    modules = {module for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    hooks = [
        module.register_forward_hook(replace) for module in modules | {model.get_input_embeddings()}
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
