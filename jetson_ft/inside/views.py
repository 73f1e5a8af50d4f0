"""All views of a loaded model, by name, with their options from outside checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from jetson_ft.errors import UserError, _
from jetson_ft.inside import (
    adapter_change,
    attention,
    in_context,
    next_token,
    numbers,
    quantization,
    tokens,
)
from jetson_ft.inside.model import LoadedModel, View

VIEWS: dict[str, Callable[..., View]] = {
    "tokens": tokens.view_tokens,
    "attention": attention.view_attention,
    "attention_example": attention.view_attention_example,
    "next_token": next_token.view_next_token,
    "reply": next_token.view_reply,
    "in_context": in_context.view_in_context,
    "numbers": numbers.view_numbers,
    "quantization": quantization.view_quantization,
    "adapter": adapter_change.view_adapter,
}


def compute_view(loaded: LoadedModel, view: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a view as JSON values.

    Args:
        view: a name in `VIEWS`.
        options: arguments of its function, as JSON values.

    Raises:
        UserError: there is no such view, the options don't fit it, or it can't be computed.
    """
    if view not in VIEWS:
        names = ", ".join(VIEWS)
        what, fix = _("There is no view {name!r}."), _("Choose one of {choices}.")
        raise UserError(what, fix=fix, name=view, choices=names)
    compute = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(VIEWS[view])
    try:
        return compute(loaded, **options).to_json()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            _("The view {name} doesn't take this value of {option}: {error}."),
            name=view, option=place, error=first["msg"],
        ) from error  # fmt: skip
