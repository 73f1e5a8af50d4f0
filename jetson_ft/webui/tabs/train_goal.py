"""Train tab, decision 1: a recipe to start from, as cards that say how it fits on this machine."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

from jetson_ft import recipe as recipes
from jetson_ft.errors import _
from jetson_ft.models import catalog
from jetson_ft.runs import recipe_fits
from jetson_ft.runs.recipe_fits import RecipeFit
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.run_settings import SETTINGS
from jetson_ft.webui.run_texts import rough_duration, short_model
from jetson_ft.webui.tabs import train_settings
from jetson_ft.webui.tabs.train_form import FIRST, HTML, Form, form_values

# The others are folded.
SHOWN = (
    FIRST, "embedded-zh-1h", "qwen3-0.6b-zh", "phi-1_5-zh-quick", "qwen3-1.7b", "qwen3-4b-qlora",
)  # fmt: skip
_VERDICTS = {"fits": _("fits"), "tight": _("tight"), "too_large": _("won't fit")}
_FITS_SECONDS = 60  # for which an estimate is kept


def build(t: Locale, page: Any) -> tuple[Any, Any]:
    """Add the cards; return hidden boxes: the chosen recipe's name, and how all of them fit."""
    values = {name: form_values(recipes.load_recipe(name)) for name in recipes.shipped()}
    cards = {name: _card(name, values[name]["model"], t) for name in values}
    description = {
        "first": FIRST,
        "order": Form.ORDER,
        "groups": train_settings.group_ids(),
        "recipes": {
            name: {"title": cards[name]["title"], "values": values[name]} for name in values
        },
        "labels": {key: t(field.title) for key, field in SETTINGS.items()},
        "texts": {
            name: t(text)
            for name, text in {
                "attention": _("Fields that need attention: {{count}}"),
                "changed": _("{{count}} changed"),
                "empty": _("empty"),
                "false": _("off"),
                "kept": _("Kept: your {{data}}."),
                "loaded": _("The form has the settings of {{title}}."),
                "reset": _("Reset to {{value}}"),
                "true": _("on"),
            }.items()
        },
    }
    HTML(
        render(
            "goal.jinja", t, form=description, shown=[cards[name] for name in SHOWN],
            more=[card for name, card in cards.items() if name not in SHOWN],
        ),
    )  # fmt: skip
    fits = gr.Textbox(visible="hidden")
    page.load(lambda: _fits_text(t), None, fits, show_progress="hidden")
    return gr.Textbox(FIRST, visible="hidden", elem_id="recipe-name"), fits


def _card(name: str, model: str, t: Locale) -> dict[str, str]:
    """Return a card's texts."""
    title, _colon, text = (
        t(recipes.summary(recipes.shipped()[name])).replace("：", ": ").partition(": ")
    )
    size = t(
        _("{model} · {size:.1f} GB"), model=short_model(model),
        size=catalog.MODELS[model].file_bytes / 1e9,
    )  # fmt: skip
    return {"name": name, "title": title, "text": text[0].upper() + text[1:], "model": size}


def _fits_text(t: Locale) -> str:
    """Return the badge and time of each recipe, for static/train_form.js."""
    fits = _recent_fits(int(time.monotonic() / _FITS_SECONDS))
    return json.dumps({name: _fit(fit, t) for name, fit in fits.items()})


@lru_cache(maxsize=1)
def _recent_fits(_minute: int) -> dict[str, RecipeFit]:
    return recipe_fits.estimate_fits()


def _fit(fit: RecipeFit, t: Locale) -> dict[str, str]:
    """Return what a card shows of an estimate."""
    style: str = fit.verdict
    badge = t(_VERDICTS[style])
    if fit.needs_download and style != "too_large":
        style, badge = "download", t(_("needs download"))
    memory = t(
        _("{peak:.1f} of {free:.1f} GiB (estimate)"), peak=fit.peak_memory_bytes / 2**30,
        free=fit.memory_bytes / 2**30,
    )  # fmt: skip
    duration = ""
    if fit.seconds:
        duration = t(_("about {time}"), time=rough_duration(fit.seconds))
    return {"style": style, "badge": badge, "memory": memory, "time": duration}
