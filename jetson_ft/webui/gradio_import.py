"""Import Gradio in half of its usual time, and without its downloads.

When a component is defined, Gradio reads and parses its module again to write a type stub beside
it. Nothing here needs the stubs.

Gradio downloads what a request names by address in the place of an uploaded file. The page needs
no such file, and a client must not choose what this machine requests.

For each update of a component, Gradio (6.31) makes a new one with another id, and keeps all of them
as long as the page is open: 0.3 MB for each press of Start. Here the new one takes the old one's
id, and so its place.
"""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

_getfile = inspect.getfile


def _getfile_except_gradio(thing: Any) -> str:
    """Raise `OSError` for Gradio's classes: it writes no stub of a class without a file."""
    if isinstance(thing, type) and thing.__module__.startswith("gradio."):
        raise OSError
    return _getfile(thing)


with mock.patch.object(inspect, "getfile", _getfile_except_gradio):
    import gradio as gr
    from gradio import processing_utils
    from gradio.blocks import Block
    from gradio.state_holder import SessionState


async def _refuse_download(url: str) -> Any:
    raise ValueError(f"This page downloads nothing ({url}).")


processing_utils.async_ssrf_protected_get = _refuse_download  # all of its downloads pass here

_set_item = SessionState.__setitem__


def _set_item_in_place(state: SessionState, key: int, value: Any) -> None:
    if isinstance(value, Block):
        value._id = key
    _set_item(state, key, value)


SessionState.__setitem__ = _set_item_in_place  # type: ignore[method-assign]

__all__ = ["gr"]
