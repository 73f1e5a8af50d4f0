"""Import Gradio in half of its usual time.

When a component is defined, Gradio reads and parses its module again to write a type stub beside
it. Nothing here needs the stubs.
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

__all__ = ["gr"]
