"""Gradio is there, and has read none of its own sources for it; in a process of its own."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import ast, inspect
getfile, parsed = inspect.getfile, []
own = ast.get_source_segment
ast.get_source_segment = lambda code, node: parsed.append(node) or own(code, node)
from jetson_ft.webui.library import gr
assert not parsed, parsed
assert inspect.getfile is getfile, "the stand-in is still in place"
assert gr.Textbox().label is None
"""


def test_gradio_writes_no_stubs_as_it_is_imported() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
