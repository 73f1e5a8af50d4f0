"""Train tab, decision 1: a recipe to start from."""

from __future__ import annotations

from typing import Any

from jetson_ft import recipe as recipes
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.train_form import FIRST, Form


def build(t: Locale, form: Form) -> Any:
    """Add the cards; return the hidden box with the chosen recipe's name."""
    gr.HTML(" ".join(recipes.shipped()))
    return gr.Textbox(FIRST, visible="hidden", elem_id="recipe-name")
