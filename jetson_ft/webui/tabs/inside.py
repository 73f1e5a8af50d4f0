"""The Inside tab: what a model does inside, drawn by the script of `jetson_ft.inside`.

The tab's form is a fragment of HTML; each view is computed in the chat's process, which holds one
model for all pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.responses import Response

import jetson_ft.inside
from jetson_ft import i18n
from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import _
from jetson_ft.inside.examples import CAPITALS, CAPITALS_QUESTION, QUESTION, SAMPLING, SENTENCE
from jetson_ft.inside.texts import view_texts
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs.chat_models import ChatModels
from jetson_ft.webui.tabs.chat_sampling import SLIDER_LABELS, SLIDERS

DRAWING_FOLDER = Path(jetson_ft.inside.__file__).with_name("static")


@dataclass(frozen=True)
class Panel:
    """One choice of the tab: the views that it shows, and the fields of its form.

    Attributes:
        texts: field -> its value at first. Fields are options of the views, except `examples`,
            which has a pair `question = answer` a line.
        sampling: whether the sliders of sampling are shown.
    """

    title: str
    views: tuple[str, ...]
    texts: dict[str, str]
    sampling: bool = False


_EXAMPLES = "\n".join(f"{question} = {answer}" for question, answer in CAPITALS)
PANELS = {
    "tokens": Panel(_("Tokens"), ("tokens",), {"text": SENTENCE, "answer": ""}),
    "attention": Panel(_("Attention"), ("attention", "attention_example"), {"text": SENTENCE}),
    "next": Panel(_("Next token"), ("next_token",), {"text": QUESTION, "reply": ""}, True),
    "reply": Panel(_("A reply"), ("reply",), {"text": QUESTION, "answer": ""}),
    "in-context": Panel(
        _("Examples"), ("in_context",),
        {"text": CAPITALS_QUESTION, "answer": "", "examples": _EXAMPLES},
    ),
    "numbers": Panel(_("Numbers"), ("numbers", "quantization"), {}),
    "adapter": Panel(_("The adapter"), ("adapter",), {}),
}  # fmt: skip
# Field -> label.
_LABELS = {
    "text": _("Text"),
    "answer": _("Answer (may be empty)"),
    "reply": _("The reply so far (may be empty)"),
    "examples": _("Examples: one `question = answer` per line"),
}


def router(runs: Path, client: ChatClient, allowed: AllowedPaths) -> APIRouter:
    """Return the routes of the tab."""
    routes = APIRouter()

    @routes.get("/live/{language}/inside")
    def form(language: str) -> Response:
        t = Locale(language)
        texts = view_texts(i18n.translator(t.language))
        models = ChatModels(t, runs, allowed)
        html = render(
            "inside.jinja", t, panels=PANELS, labels=_LABELS, models=models.choices(),
            chosen=models.newest(), sliders=SLIDERS, slider_labels=SLIDER_LABELS,
            sampling=SAMPLING,
            texts=json.dumps(texts, ensure_ascii=False),
        )  # fmt: skip
        return HTMLResponse(html)

    @routes.post("/inside/{view}")
    def show(
        view: str,
        model: Annotated[str, Body()],
        options: Annotated[dict[str, Any], Body()],
    ) -> Response:
        name = ChatModels(Locale(""), runs, allowed).require(model)
        return JSONResponse(client.view(name, view, options))

    return routes


def build(drawing: str) -> None:
    """Add the place that the tab's script fills; `drawing` is the address of the drawing."""
    place = f'<div id="inside-page" data-drawing="{escape(drawing)}"></div>'
    gr.HTML(place, apply_default_css=False)
