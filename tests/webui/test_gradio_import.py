"""Gradio is imported without parsing its own sources; in a process of its own."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import ast, inspect
getfile, parsed = inspect.getfile, []
own = ast.get_source_segment
ast.get_source_segment = lambda code, node: parsed.append(node) or own(code, node)
from jetson_ft.webui.gradio_import import gr
assert not parsed, parsed
assert inspect.getfile is getfile, "the patch is still in place"
assert gr.Textbox().label is None
"""


def test_importing_gradio_writes_no_stubs() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
