"""Gradio, imported in half of its time.

As each of its components is defined, Gradio reads and parses that module again, to write stubs
for editors beside it. Nothing here needs them.
"""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

_getfile = inspect.getfile


def _as_if_without_file(thing: Any) -> str:
    """Gradio writes no stub of a component that isn't in a file."""
    if isinstance(thing, type) and thing.__module__.startswith("gradio."):
        raise OSError
    return _getfile(thing)


with mock.patch.object(inspect, "getfile", _as_if_without_file):
    import gradio as gr

__all__ = ["gr"]
