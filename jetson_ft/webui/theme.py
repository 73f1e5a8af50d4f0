"""Gradio's theme in the tokens of `runs/report/tokens.css`, and what the page's head loads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render

# In the order in which they are loaded. `shell` is what all tabs share.
_STYLES = ("shell", "train", "train_side", "runs", "run_views", "chat", "inside", "device")
_SCRIPTS = ("shell", "train", "runs", "run_views", "progress", "chat", "inside", "device")

# Gradio's variable -> its value, in light and dark alike.
_VARIABLES = {
    "body_background_fill": "var(--paper)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--soft)",
    "background_fill_primary": "var(--card)",
    "background_fill_secondary": "var(--well)",
    "border_color_primary": "var(--line)",
    "border_color_accent": "var(--tuned)",
    "border_color_accent_subdued": "var(--line)",
    "color_accent": "var(--tuned)",
    "color_accent_soft": "var(--well)",
    "link_text_color": "var(--tuned)",
    "link_text_color_active": "var(--tuned)",
    "link_text_color_hover": "var(--ink)",
    "link_text_color_visited": "var(--tuned)",
    "code_background_fill": "var(--well)",
    "shadow_drop": "none",
    "shadow_drop_lg": "none",
    "block_background_fill": "var(--card)",
    "block_border_color": "var(--line)",
    "block_info_text_color": "var(--soft)",
    "block_label_background_fill": "var(--card)",
    "block_label_border_color": "var(--line)",
    "block_label_text_color": "var(--soft)",
    "block_title_text_color": "var(--ink)",
    "block_title_text_weight": "600",
    "block_shadow": "none",
    "panel_background_fill": "var(--card)",
    "accordion_text_color": "var(--ink)",
    "table_text_color": "var(--ink)",
    "table_border_color": "var(--line)",
    "table_even_background_fill": "var(--card)",
    "table_odd_background_fill": "var(--card)",
    "input_background_fill": "var(--card)",
    "input_background_fill_focus": "var(--card)",
    "input_border_color": "var(--edge)",
    "input_border_color_focus": "var(--focus)",
    "input_border_color_hover": "var(--ink)",
    "input_border_width": "1px",
    "input_placeholder_color": "var(--soft)",
    "checkbox_background_color": "var(--card)",
    "checkbox_background_color_selected": "var(--tuned)",
    "checkbox_background_color_focus": "var(--card)",
    "checkbox_border_color": "var(--edge)",
    "checkbox_border_color_selected": "var(--tuned)",
    "checkbox_border_color_focus": "var(--focus)",
    "checkbox_border_width": "2px",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_hover": "var(--well)",
    "checkbox_label_background_fill_selected": "transparent",
    "checkbox_label_border_width": "0px",
    "checkbox_label_text_color": "var(--ink)",
    "checkbox_label_text_color_selected": "var(--ink)",
    "error_background_fill": "var(--card)",
    "error_border_color": "var(--bad)",
    "error_text_color": "var(--bad)",
    "error_icon_color": "var(--bad)",
    "loader_color": "var(--tuned)",
    "slider_color": "var(--tuned)",
    "stat_background_fill": "var(--tuned)",
    "button_border_width": "1px",
    "button_primary_background_fill": "var(--tuned)",
    "button_primary_background_fill_hover": "var(--tuned)",
    "button_primary_border_color": "var(--tuned)",
    "button_primary_text_color": "var(--on-tuned)",
    "button_primary_text_color_hover": "var(--on-tuned)",
    "button_secondary_background_fill": "var(--card)",
    "button_secondary_background_fill_hover": "var(--well)",
    "button_secondary_border_color": "var(--edge)",
    "button_secondary_text_color": "var(--ink)",
    "button_secondary_text_color_hover": "var(--ink)",
    "button_cancel_background_fill": "var(--card)",
    "button_cancel_border_color": "var(--bad)",
    "button_cancel_text_color": "var(--bad)",
}


# Variables of which Gradio has no value for dark.
_ONE_VALUE = ("color_accent", "shadow_drop", "shadow_drop_lg", "block_title_text_weight")
_SIZES = ("xxs", "xs", "sm", "md", "lg", "xl", "xxl")
_TEXT_SIZES = ("small", "small", "small", "text", "text", "large", "title")


def theme() -> Any:
    """Return Gradio's theme: fonts of the browser's machine, as web fonts need a network."""
    sizes = {size: f"var(--{token})" for size, token in zip(_SIZES, _TEXT_SIZES, strict=True)}
    look = gr.themes.Base(
        text_size=gr.themes.Size(**sizes, name="text"),
        radius_size=gr.themes.Size(**dict.fromkeys(_SIZES, "var(--radius)"), name="radius"),
        font=["var(--fonts)", "sans-serif"], font_mono=["var(--mono)", "monospace"],
    )  # fmt: skip
    dark = {f"{name}_dark": value for name, value in _VARIABLES.items() if name not in _ONE_VALUE}
    return look.set(**_VARIABLES, **dark)


def head(t: Locale) -> str:
    """Return what comes first in the page's head: the tokens, and the tabs' styles and scripts."""
    styles = [f"{STATIC}/{name}.css" for name in _STYLES]
    scripts = [f"{STATIC}/{name}.js" for name in _SCRIPTS]
    return render("head.jinja", t, styles=styles, scripts=scripts)


def content_hash(folder: Path) -> str:
    """Return a hash of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


STATIC_FOLDER = Path(__file__).with_name("static")
# The address of those files changes with them, so that browsers keep them for good.
STATIC = f"/static/{content_hash(STATIC_FOLDER)}"
