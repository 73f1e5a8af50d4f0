"""What importing Gradio changes: no stubs, no component kept for each update."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

from page_client import PageClient
from starlette.testclient import TestClient

from jetson_ft.webui import page
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.security import AccessPolicy

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


def test_updates_of_the_form_keep_no_component(tmp_path: Path) -> None:
    app = page.make_app(tmp_path, AccessPolicy())
    counts = []
    with TestClient(app, "http://127.0.0.1:7860/en") as http:
        client = PageClient("", http=http)
        for _click in range(4):
            dependency = client.dependency("start")
            outputs = client.call(dependency, client.values(dependency, model="/no/model"))
            assert "Model not found" in outputs[0]
            gc.collect()
            counts.append(sum(isinstance(part, gr.Textbox) for part in gc.get_objects()))
    assert counts[1:] == counts[1:2] * 3
