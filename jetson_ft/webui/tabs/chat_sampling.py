"""The settings of the Chat tab: presets, and a slider for each range in `Sampling`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from jetson_ft.errors import UserError, _
from jetson_ft.inference.generate import Sampling
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale

# The sampling settings with a slider.
SLIDERS: list[Any] = [option for option in fields(Sampling) if "min" in option.metadata]
# Sampling setting -> label.
SLIDER_LABELS = {
    "max_new_tokens": _("Longest answer (tokens)"),
    "temperature": _("Temperature (0: greedy)"),
    "top_k": _("Top-k"),
    "top_p": _("Top-p"),
    "repetition_penalty": _("Repetition penalty"),
}
PRESETS = {
    "precise": (_("Precise"), Sampling()),
    "balanced": (_("Balanced"), replace(Sampling(), temperature=0.7, top_p=0.9)),
    "creative": (_("Creative"), replace(Sampling(), temperature=1.1, top_p=0.95)),
}
_LENGTH = "max_new_tokens"  # no preset changes it


def build_sliders(t: Locale) -> list[Any]:
    """Add the presets and the sliders; return the sliders' components."""
    preset = gr.Radio(
        [(t(label), name) for name, (label, _sampling) in PRESETS.items()],
        value="precise", label=t(_("Preset")), elem_id="chat-preset",
    )  # fmt: skip
    sliders = [
        gr.Slider(
            option.metadata["min"], option.metadata["max"], option.default,
            step=option.metadata["step"], label=t(SLIDER_LABELS[option.name]),
            elem_id=f"chat-{option.name}",
        )
        for option in SLIDERS
    ]  # fmt: skip
    changed = [
        slider for slider, option in zip(sliders, SLIDERS, strict=True) if option.name != _LENGTH
    ]
    preset.input(preset_values, preset, changed, show_progress="hidden")
    for slider in changed:
        slider.release(matching_preset, changed, preset, show_progress="hidden")
    return sliders


def preset_values(preset: str) -> list[Any]:
    """Return the sliders' values of a preset."""
    _label, sampling = PRESETS[preset]
    return [getattr(sampling, option.name) for option in SLIDERS if option.name != _LENGTH]


def matching_preset(*values: Any) -> str | None:
    """Return the preset that has these values; None: no one has."""
    return next((name for name in PRESETS if preset_values(name) == list(values)), None)


def read_sampling(seed: str, values: Sequence[Any]) -> Sampling:
    """Return the settings of the sliders and the seed's field."""
    settings = {option.name: value for option, value in zip(SLIDERS, values, strict=True)}
    if seed and seed.strip():
        if not re.fullmatch(r"[0-9]{1,19}", seed.strip()):
            raise UserError(_("The seed must be a whole number."), seed)
        settings["seed"] = int(seed)
    return Sampling(**settings)
