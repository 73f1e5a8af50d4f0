"""Train tab, decision 3: the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jetson_ft.errors import _
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.train_form import Form


def build(t: Locale, runs: Path, allowed: AllowedPaths, form: Form, fields: dict[str, Any]) -> None:
    """Add the widgets that choose the rows, and `fields["data.train"]`."""
    fields["data.train"] = gr.Textbox("bundled", label=t(_("Data")), elem_id="field-data-train")
