"""How many tokens a model can read at a time.

A table of positions (GPT-2, OPT, GPT-J, …) has no entry behind its end: a longer row is an error.
Rotary embeddings are computed for any position; behind `max_position_embeddings` the model has not
learned them.
"""

from __future__ import annotations

from typing import Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles

_PADDING = 2  # entries that some tables have before the first position (OPT, BART)
# These compute their position biases for `max_seq_len` tokens only, without a table.
_LIMITED_BIASES = ("mpt",)


def max_positions(config: Any) -> int | None:
    """Return the tokens that a transformers config allows at a time; None: it names no limit."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        if limit := getattr(config, name, None):
            return int(limit)
    return None


def position_table_size(model: Any) -> int | None:
    """Return the tokens that a model's position table has entries for; None: it has no table.

    The model may be on the meta device. A table is recognised by its name and its size.
    """
    limit = max_positions(model.config)
    if limit is None:
        return None
    if model.config.get_text_config().model_type in _LIMITED_BIASES:
        return limit
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_positions = "pos" in name or "wpe" in name
        owner = model.get_submodule(name.rpartition(".")[0])
        if hasattr(owner, "make_weights"):  # a table of sines that grows with the rows (XGLM)
            continue
        if is_positions and tensor.ndim == 2 and limit <= tensor.shape[0] <= limit + _PADDING:
            return limit
    return None


def config_table_size(config: Any) -> int | None:
    """Return `position_table_size` of the model that a config describes, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return position_table_size(AutoModelForCausalLM.from_config(config))


def check_longest_row(base: BaseModelFiles, longest: int) -> Message | None:
    """Return a warning if a row of `longest` tokens has positions that the model hasn't learned.

    Raises:
        UserError: the model can't compute such a row.
    """
    config = loading.load_config(base)
    limit = max_positions(config)
    if limit is None or longest <= limit:
        return None
    if config_table_size(config):
        raise beyond_table(base.name, limit, longest)
    text = _(
        "The longest row has {longest:,} tokens; the model has learned {limit:,} positions, and "
        "what follows them may be learned badly. `data.max_length: {limit}` truncates such rows."
    )
    return Message(text, {"longest": longest, "limit": limit})


def beyond_table(name: str, limit: int, longest: int) -> UserError:
    """Return the error for a row that is longer than a model's table of positions."""
    return UserError(
        _("The model reads {limit:,} tokens at most, and the longest row has {longest:,}."),
        name,
        _("Set `data.max_length` to {limit} or less, or choose a model with more positions."),
        limit=limit,
        longest=longest,
    )
