"""The page itself, built once in each language: a head, and a tab for each thing people do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jetson_ft.runs.parlour import Parlour
from jetson_ft.webui import chat, device, train
from jetson_ft.webui.library import gr
from jetson_ft.webui.words import LANGUAGES, Words

STATIC = Path(__file__).with_name("static")


def build(language: str, runs: Path, parlour: Parlour, doctor: device.Doctor) -> Any:
    """The page in one language, over the runs in that folder."""
    words = Words(language)
    with gr.Blocks(title="jetson-ft", analytics_enabled=False) as page:
        gr.HTML(_head(words), apply_default_css=False)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab(words("tab.train"), id="train"):
                train.build(words, runs, page, tabs)
            with gr.Tab(words("tab.runs"), id="runs"):
                gr.HTML(_RUNS, apply_default_css=False)
            with gr.Tab(words("tab.chat"), id="chat") as place:
                chat.build(words, runs, parlour, page, place)
            with gr.Tab(words("tab.device"), id="device") as place:
                device.build(words, doctor, place)
    return page


def theme() -> Any:
    """Fonts of the visitor's own machine, so that the page needs no network."""
    return gr.themes.Base(
        primary_hue="green",
        font=["system-ui", "Noto Sans CJK SC", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def _head(words: Words) -> str:
    others = "".join(
        f'<button data-language="{name}" lang="{name}">{text}</button>'
        for name, text in LANGUAGES.items()
        if name != words.language
    )
    subtitle = words("page.subtitle")
    return f'<div class="page-head"><h1>jetson-ft</h1><p>{subtitle}</p>{others}</div>'


_RUNS = '<div id="run-page"><div id="run-list"></div><div id="run-detail"></div></div>'
