"""A view as one HTML file: its data, the drawing and the texts of all languages are in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jetson_ft import i18n
from jetson_ft.files import disk_errors, write_atomic
from jetson_ft.inside.texts import view_texts

# In the order of their imports.
_SCRIPTS = ("charts", "text_views", "reply_views", "model_views", "inside")


def write_page(path: Path, views: Mapping[str, Any], model: str) -> None:
    """Write the page of one or more views.

    Args:
        views: the JSON of each, by the name that `draw` knows it by.
        model: what is inspected, for the title.

    Raises:
        UserError: the file can't be written.
    """
    with disk_errors(path):
        write_atomic(path, render_page(views, model))


def render_page(views: Mapping[str, Any], model: str) -> str:
    """Return the page; it loads nothing."""
    from jinja2 import Environment, FileSystemLoader

    static = files("jetson_ft.inside") / "static"
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    languages = {
        tag: {"name": name, "texts": view_texts(i18n.translator(tag))}
        for tag, name in i18n.languages().items()
    }
    return environment.get_template("page.html.jinja").render(
        model=model,
        tokens=(files("jetson_ft.runs.report") / "tokens.css").read_text("utf-8"),
        style=(static / "inside.css").read_text("utf-8"),
        script="".join(_as_part((static / f"{name}.js").read_text("utf-8")) for name in _SCRIPTS),
        views=_for_script(views),
        languages=_for_script(languages),
    )


def _as_part(module: str) -> str:
    """Return an ES module as a part of one script, without imports and exports."""
    lines = (line for line in module.splitlines() if not line.startswith("import "))
    return "\n".join(line.removeprefix("export ") for line in lines) + "\n"


def _for_script(value: Any) -> str:
    """Return JSON that can stand in a script: `<` would allow a text to end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
