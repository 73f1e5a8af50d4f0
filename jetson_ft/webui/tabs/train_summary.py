"""Train tab, the right column: what will happen, and Start."""

from __future__ import annotations

from typing import Any

from jetson_ft.errors import RecipeError, UserError, _
from jetson_ft.runs import manager
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, error_html
from jetson_ft.webui.tabs.train_form import Form


def build(t: Locale, form: Form, name: Any, fields: dict[str, Any], tabs: Any) -> None:
    """Add the column's components."""
    outcome = gr.HTML()
    start = gr.Button(t(_("Start")), variant="primary")

    def begin(name: str, *values: Any) -> list[Any]:
        try:
            manager.launch(form.recipe(values), name)
            return ["", *form.mistakes(None)]
        except RecipeError as error:
            return ["", *form.mistakes(error, focus=True)]
        except UserError as error:
            return [error_html(error, t), *form.mistakes(None)]

    start.click(begin, [name, *fields.values()], [outcome, form.marks])
