"""Train tab, decisions 2 and 4: the model, and the other settings, by the recipe's schema."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args, get_origin

from jetson_ft import hub
from jetson_ft.errors import _
from jetson_ft.models import catalog
from jetson_ft.models.embedded import NAME
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.run_settings import SETTINGS
from jetson_ft.webui.tabs.train_form import DATA, HTML, element_id, is_number

MODEL = ("model", "quantize", "precision")
ESSENTIAL = ("train.max_minutes", "train.epochs", "lora.rank", "train.learning_rate")
# Group -> its title, and the first parts of the keys in it, or whole keys.
_GROUPS = {
    "data": (_("Data"), ("data")),
    "lora": (_("LoRA"), ("lora")),
    "training": (_("Training"), ("train")),
    "evaluation": (_("Evaluation"), ("eval", "train.eval_every", "train.early_stopping_patience")),
    "device": (
        _("Device"),
        ("double_quantize", "train.max_memory_gb", "train.on_oom", "device", "run"),
    ),
}
# The end of a help's first sentence: what an empty field means.
_EMPTY = re.compile(r"[;；]\s*null[:：]\s*([^.。;；]+)")


def group_ids() -> dict[str, str]:
    """Return the element of the group that each folded key is in."""
    ids = {}
    for name, (_title, starts) in reversed(_GROUPS.items()):
        for key in SETTINGS:
            if key not in ids and (key in starts or key.partition(".")[0] in starts):
                ids[key] = f"group-{name}"
    return {key: name for key, name in ids.items() if key not in (*MODEL, *ESSENTIAL, DATA)}


def components(t: Locale, values: dict[str, Any]) -> dict[str, Any]:
    """Return the component of every key except the rows; `render` places it in the layout."""
    return {key: _component(key, values[key], t) for key in SETTINGS if key != DATA}


def build_model(t: Locale, fields: dict[str, Any]) -> None:
    """Add the choice of the model and of its weights' format."""
    with gr.Row(elem_classes="fields model"):
        for key in MODEL:
            fields[key].render()
    model = fields["model"]
    model.focus(lambda: gr.Dropdown(choices=_models(t)), None, model, show_progress="hidden")


def build_settings(t: Locale, fields: dict[str, Any]) -> None:
    """Add the essential settings, and the others folded by group."""
    HTML(f"<style>{_key_styles()}</style>")
    with gr.Row(elem_classes="fields"):
        for key in ESSENTIAL:
            fields[key].render()
    ids = group_ids()
    for name, (title, _starts) in _GROUPS.items():
        with (
            gr.Accordion(t(title), open=False, elem_id=f"group-{name}", elem_classes="group"),
            gr.Row(elem_classes="fields"),
        ):
            for key, group in ids.items():
                if group == f"group-{name}":
                    fields[key].render()


def _key_styles() -> str:
    """Return the rules that show each field's key beside its label."""
    places = "#{0} [data-testid=block-info]::after,#{0} .label-text::after"
    return "".join(f'{places.format(element_id(key))}{{content:"{key}"/""}}' for key in SETTINGS)


def _component(key: str, value: Any, t: Locale) -> Any:
    """Return the component for a field's type; a text box where several types are possible."""
    field = SETTINGS[key]
    text = t(field.description)
    empty = _EMPTY.search(text)
    text = _EMPTY.sub("", text, count=1)
    options = {
        "value": value, "label": t(field.title), "min_width": 140, "elem_id": element_id(key),
        "info": re.split(r"(?<=[.。]) |(?<=。)", text)[0], "render": False,
    }  # fmt: skip
    placeholder = empty[1].replace("`", "") if empty else None
    if field.annotation is bool:
        return gr.Checkbox(**options)
    if key == "model":
        return gr.Dropdown(_models(t), allow_custom_value=True, **options)
    if get_origin(field.annotation) is Literal:
        return gr.Dropdown([*get_args(field.annotation)], filterable=False, **options)
    if is_number(field.annotation):
        return gr.Number(placeholder=placeholder, step=_step(value), **options)
    return gr.Textbox(placeholder=placeholder, max_lines=1, **options)


def _step(value: Any) -> float:
    """Return by how much an arrow key changes a number: a whole one by one, others by less."""
    if not isinstance(value, float):
        return 1
    if value >= 1:
        return 0.5
    return 10.0 ** math.floor(math.log10(value) - 1) if value else 0.05


def _models(t: Locale) -> list[tuple[str, str]]:
    """Return (label, name) of the known models, and of those that are on this machine."""
    downloaded = hub.downloaded_models()
    choices = []
    for name, model in catalog.MODELS.items():
        facts = [f"{model.file_bytes / 1e9:.1f} GB", model.licence]
        if model.gated:
            facts.append(t(_("terms to accept")))
        is_here = name in ("embedded", *downloaded)
        facts.append(t(_("on this machine")) if is_here else t(_("needs download")))
        title = f"{name} ({NAME})" if name == "embedded" else name
        choices.append((" · ".join([title, *facts]), name))
    others = [name for name in downloaded if name not in catalog.MODELS]
    return [*choices, *((f"{name} · {t(_('on this machine'))}", name) for name in others)]
