"""The Train tab: three decisions and settings on the left, what will happen on the right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from jetson_ft import recipe as recipes
from jetson_ft.errors import _
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs import train_data, train_goal, train_settings, train_summary
from jetson_ft.webui.tabs.train_form import FIRST, HTML, Form, form_values


def build(t: Locale, runs: Path, page: Any, tabs: Any, allowed: AllowedPaths) -> None:
    """Add the tab's components."""
    form = Form(t, runs, allowed)
    # In the order of `Form.ORDER`; `train_data` adds the last.
    fields = train_settings.components(t, form_values(recipes.load_recipe(FIRST)))
    form.marks = gr.Textbox(visible="hidden", elem_id="form-marks")
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(scale=3, min_width=320, elem_id="decisions"):
            with _decision(1, t(_("Goal")), "goal"):
                name, fits = train_goal.build(t, page)
                loaded, notice = gr.Textbox(visible="hidden"), HTML(elem_id="form-notice")
                with gr.Row(elem_classes="links"):
                    upload = gr.UploadButton(
                        t(_("Upload a recipe file …")), file_types=[".yaml", ".yml"], size="sm",
                        elem_classes="link",
                    )  # fmt: skip
                    label = escape(t(_("Start over")))
                    HTML(f'<button type="button" id="start-over" hidden>{label}</button>')
            with _decision(2, t(_("Model")), "model"):
                train_settings.build_model(t, fields)
            with _decision(3, t(_("Data")), "data"):
                train_data.build(t, runs, form, fields)
            with _decision(4, t(_("Settings")), "settings"):
                train_settings.build_settings(t, fields)
        with gr.Column(scale=2, min_width=320, elem_id="summary"):
            HTML('<div id="attention" role="alert"></div>')
            train_summary.build(t, form, name, fields, tabs)
    _connect(form, name, fields, [fits, loaded])
    upload.upload(form.load, upload, [notice, loaded])
    page.load(form.open_address, None, [notice, loaded], show_progress="hidden")


def _connect(form: Form, name: Any, fields: dict[str, Any], late: list[Any]) -> None:
    """Connect the fields with static/train_form.js, by events that don't reach the server.

    Args:
        late: hidden boxes for what the server sends after the page: `fits` and `loaded`.
    """
    inputs = [*fields.values()]
    load = gr.Button(visible="hidden", elem_id="form-load")
    js = "(...values) => jetsonFt.formLoad(...values)"
    load.click(None, [*late, *inputs], [name, *inputs], js=js)
    for box, function in zip(late, ("formFits", "formLoaded"), strict=True):
        box.change(None, box, None, js=f"text => jetsonFt.{function}(text)")
    apply = gr.Button(visible="hidden", elem_id="form-apply")
    apply.click(None, None, [name, *inputs], js="() => jetsonFt.formApply()")
    changes = [field.change for field in inputs]
    gr.on(changes, None, inputs, None, js="(...values) => jetsonFt.formChanged(...values)")
    form.marks.change(None, form.marks, None, js="text => jetsonFt.formMistakes(text)")


@contextmanager
def _decision(number: int, title: str, name: str) -> Iterator[None]:
    """Add a numbered card with a title."""
    with gr.Column(elem_id=f"decision-{name}", elem_classes="decision"):
        HTML(f"<h2><span>{number}</span>{escape(title)}</h2>")
        yield
