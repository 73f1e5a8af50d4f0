"""Train tab, decisions 2 and 4: the model, and the other settings, by the recipe's schema."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from jetson_ft.errors import _
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.train_form import DATA, FIELDS, is_number

MODEL = ("model", "quantize")
ESSENTIAL = ("train.max_minutes", "train.epochs", "lora.rank", "train.learning_rate")
# Title -> the first parts of the keys in it, or whole keys.
GROUPS = {
    _("Data"): ("data",),
    _("LoRA"): ("lora",),
    _("Training"): ("train",),
    _("Evaluation"): ("eval",),
    _("Device"): ("precision", "double_quantize", "device", "run"),
}


def components(t: Locale, values: dict[str, Any]) -> dict[str, Any]:
    """Return the component of every key except the rows; `render` places it in the layout."""
    return {key: _component(key, values[key], t) for key in FIELDS if key != DATA}


def build_settings(t: Locale, fields: dict[str, Any]) -> None:
    """Add the essential settings, and the others folded by group."""
    with gr.Row(elem_classes="fields"):
        for key in ESSENTIAL:
            fields[key].render()
    for title, starts in GROUPS.items():
        keys = [key for key in FIELDS if key not in (*MODEL, *ESSENTIAL, DATA)
                and (key in starts or key.partition(".")[0] in starts)]  # fmt: skip
        with (
            gr.Accordion(t(title), open=False, elem_id=f"group-{starts[0]}"),
            gr.Row(elem_classes="fields"),
        ):
            for key in keys:
                fields[key].render()


def _component(key: str, value: Any, t: Locale) -> Any:
    """Return the component for a field's type; a text box where several types are possible."""
    field = FIELDS[key]
    options = {
        "value": value, "label": field.title or key, "info": t(field.description), "min_width": 220,
        "elem_id": f"field-{key.replace('.', '-')}", "render": False,
    }  # fmt: skip
    if field.annotation is bool:
        return gr.Checkbox(**options)
    if get_origin(field.annotation) is Literal:
        return gr.Dropdown([*get_args(field.annotation)], **options)
    if is_number(field.annotation):
        return gr.Number(**options)
    return gr.Textbox(**options)
