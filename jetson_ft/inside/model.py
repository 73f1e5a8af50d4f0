"""A loaded model that is inspected: its base and its adapter in one load, its texts as ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from jetson_ft.adapter import adapter_context
from jetson_ft.data.chat_template import ANSWER, END, Encoded, encode, encode_prompt
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.long_texts import token_ids
from jetson_ft.errors import UserError, _
from jetson_ft.inference.generate import check_embeddings
from jetson_ft.recipe import Recipe

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DECIMALS = 4  # of probabilities and other numbers in a result


@runtime_checkable
class LoadedModel(Protocol):
    """A model with its tokenizer, such as a `chat.session.ChatSession`."""

    model: Any
    tokenizer: Any
    has_adapter: bool
    adapter_name: str  # of the adapter, among those that the model has
    context_length: int  # most tokens of a text
    recipe: Recipe  # names the base model, and has the adapter's settings


class View:
    """A result that can be drawn; a base class of dataclasses."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with nested results as objects."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, View):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], View):
        return [each.to_json() for each in value]
    return value  # a list of numbers can be long: it is not copied


def sides_of(loaded: LoadedModel) -> list[str]:
    """Return `base`, and `adapter` where there is one."""
    return ["base", "adapter"] if loaded.has_adapter else ["base"]


@contextmanager
def use_side(loaded: LoadedModel, side: str) -> Iterator[None]:
    """Compute with the base or with the adapter within the context, without gradients."""
    import torch

    with adapter_context(loaded, side == "adapter"), torch.inference_mode():
        yield


def each_side(loaded: LoadedModel, compute: Callable[[], T]) -> dict[str, T]:
    """Return what `compute` returns for the base, and for the adapter where there is one."""
    result = {}
    for side in sides_of(loaded):
        with use_side(loaded, side):
            result[side] = compute()
    return result


def text_ids(loaded: LoadedModel, text: str, limit: int) -> list[int]:
    """Return the ids of a text, with the start token if the tokenizer has one.

    Raises:
        UserError: the text has no token, or more than `limit` or the model's context.
    """
    tokenizer = loaded.tokenizer
    start = [i for i in tokenizer("", verbose=False)["input_ids"] if i != tokenizer.eos_token_id]
    ids = token_ids(tokenizer, clean(text))
    if not ids:
        raise UserError(_("The text is empty."), fix=_("Write a few words."))
    return check_ids(loaded, start + ids, limit)


def prompt_ids(
    loaded: LoadedModel, question: str, reply: str, system: str, limit: int
) -> list[int]:
    """Return the ids of a question in the chat template, and of the start of a reply to it.

    Raises:
        UserError: there are more than `limit` or the model's context.
    """
    prompt = encode_prompt(loaded.tokenizer, conversation(question, system))
    reply_ids = token_ids(loaded.tokenizer, clean(reply)) if reply else []
    return check_ids(loaded, prompt + reply_ids, limit)


def answered(
    loaded: LoadedModel, messages: Sequence[ChatMessage], answer: str, limit: int
) -> Encoded:
    """Return the ids of a conversation that ends with this answer, as training encodes it.

    Raises:
        UserError: there are more than `limit` or the model's context.
    """
    last = ChatMessage(role="assistant", content=clean(answer))
    encoded = encode(loaded.tokenizer, [*messages, last])
    # Behind the end token some templates write more, of which nothing is trained on.
    length = max(i for i, role in enumerate(encoded.segments) if role in (ANSWER, END)) + 1
    encoded.ids, encoded.segments = encoded.ids[:length], encoded.segments[:length]
    check_ids(loaded, encoded.ids, limit)
    return encoded


def conversation(question: str, system: str = "") -> list[ChatMessage]:
    """Return the messages of a conversation with one question."""
    before = [ChatMessage(role="system", content=clean(system))] if system else []
    return [*before, ChatMessage(role="user", content=clean(question))]


def clean(text: str) -> str:
    """Return the text with "?" for half of a surrogate pair, which has no bytes."""
    return text.encode(errors="replace").decode()


def check_ids(loaded: LoadedModel, ids: list[int], limit: int) -> list[int]:
    """Return the ids if the model can read them.

    Raises:
        UserError: they are more than `limit` or the model's context, or one has no embedding.
    """
    limit = min(limit, loaded.context_length)
    if len(ids) > limit:
        raise UserError(
            _("The text has {tokens:,} tokens, and this view shows {limit:,} at most."),
            fix=_("Shorten it."), tokens=len(ids), limit=limit,
        )  # fmt: skip
    check_embeddings(loaded.model, loaded.tokenizer, max(ids))
    return ids


def logits_at(model: Any, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Return the logits of the token behind each position: [positions, vocabulary]."""
    import torch

    device = model.get_input_embeddings().weight.device
    keep = torch.tensor(positions, device=device)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    has_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
    options = {"logits_to_keep": keep} if has_keep else {}
    logits = model(
        input_ids=torch.tensor([ids], device=device), use_cache=False, **options
    ).logits[0]  # fmt: skip
    result: torch.Tensor = logits if has_keep else logits[keep]
    return result


def rounded(values: Any, is_relative: bool = False) -> list[Any]:
    """Return a tensor as nested lists of numbers with few decimals; None for NaN.

    Args:
        is_relative: with as many significant digits instead, also where the numbers are small.
    """
    import numpy as np

    array = values.double().cpu().numpy()
    if is_relative:
        power = 10.0 ** (DECIMALS - 1 - np.floor(np.log10(np.maximum(np.abs(array), 1e-30))))
        array = np.round(array * power) / power
    else:
        array = np.round(array, DECIMALS)
    listed = array.astype(object)
    listed[np.isnan(array)] = None
    return list(listed.tolist())


def significant(value: Any) -> float:
    """Return a number with four significant digits, as probabilities can be very small."""
    return float(f"{float(value):.4g}")
