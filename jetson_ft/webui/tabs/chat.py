"""The Chat tab: one model, or two models that answer the same questions side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import _
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs.chat_conversation import SECOND_PANE, ChatTab
from jetson_ft.webui.tabs.chat_sampling import build_sliders

_MAX_LINES = 8  # of the composer; a longer text scrolls


def build(t: Locale, runs: Path, client: ChatClient, tab: Any, allowed: AllowedPaths) -> None:
    """Add the tab's components and connect them."""
    chat = ChatTab(t, runs, client, allowed)
    chatbot = partial(
        gr.Chatbot, feedback_options=None, buttons=["copy"], editable="user", height="100%",
        group_consecutive_messages=False,
    )  # fmt: skip
    with gr.Column(elem_id="chat"):
        with gr.Row(elem_id="chat-head"):
            first, second = (
                gr.Dropdown(label=t(label), allow_custom_value=True, elem_id=element)
                for label, element in (
                    (_("Model"), "chat-first"),
                    (_("Compare with"), "chat-second"),
                )
            )
            gr.HTML(render("chat_menu.jinja", t), apply_default_css=False)
        gr.HTML(render("chat_switch.jinja", t), apply_default_css=False)
        with gr.Row(elem_id="chat-panes"):
            pane = chatbot(elem_id="chat-a")
            second_pane = chatbot(visible=False, elem_id=SECOND_PANE)
        status = gr.HTML(elem_id="chat-status", apply_default_css=False)
        message = gr.Textbox(
            show_label=False, label=t(_("Message")), container=False, elem_id="chat-message",
            lines=1, max_lines=_MAX_LINES, placeholder=t(_("Ask something …")),
            submit_btn=t(_("Send")),
        )  # fmt: skip
        with gr.Column(elem_id="chat-settings"):
            gr.HTML(render("chat_drawer.jinja", t, title=_("Settings")), apply_default_css=False)
            system = gr.Textbox(label=t(_("System message")), lines=2)
            sliders = build_sliders(t)
            seed = gr.Textbox(label=t(_("Seed (empty: none)")))
            gr.HTML(render("chat_examples.jinja", t), apply_default_css=False)
            from_data = gr.Button(t(_("Three from the data")), size="sm")
        gr.HTML(render("chat_history.jinja", t), apply_default_css=False)
        # Filled and pressed by chat.js.
        wanted, examples, pairs, retried = (gr.Textbox(visible=False) for _ in range(4))
        load, retry = (
            gr.Button(elem_id=element, visible="hidden") for element in ("chat-load", "chat-retry")
        )

    panes, models = [pane, second_pane], [first, second]
    form = [*models, message, *panes, system, examples, seed, *sliders]
    shown = [*panes, status]
    filled = f"jetsonFt.chat.form(values, {form.index(examples)})"
    answering: Any = {
        "inputs": form, "outputs": [message, *shown], "js": f"(...values) => {filled}",
        "concurrency_limit": None, "show_progress": "hidden",
    }  # fmt: skip
    retrying = {
        "inputs": [retried, *form],
        "js": f"(_retried, ...values) => [jetsonFt.chat.retriedAnswer(), ...{filled}]",
    }
    answers: Any = [
        message.submit(chat.send, **answering),
        retry.click(chat.retry_any, **answering | retrying),
    ]
    for each in panes:
        answers += [
            each.example_select(chat.start, **answering), each.edit(chat.edit, **answering),
            each.retry(chat.retry, **answering), each.option_select(chat.proceed, **answering),
        ]  # fmt: skip
        each.change(None, [*models, *panes], js="jetsonFt.chat.keep")
    message.stop(chat.stop)
    quiet: Any = {"show_progress": "hidden"}
    # Cancelled before it is ended: the last part of an answer would come after what replaces it.
    for choice in models:
        chosen = choice.input(None, cancels=answers).then(
            chat.choose, models, [message, *models, *panes], **quiet
        )
        chosen.then(chat.present, models, shown, **quiet)
        choice.focus(chat.refresh, first, models, **quiet)
    opened = tab.select(
        chat.open, [*models, wanted, pane], [*models, wanted], js="jetsonFt.chat.open", **quiet
    )
    opened.then(None, js="jetsonFt.chat.loadPending")
    ended = load.click(None, cancels=answers).then(chat.end, outputs=message, **quiet)
    loaded = ended.then(None, [*models, *panes], [*models, *panes], js="jetsonFt.chat.take")
    for ready in (opened, loaded):
        ready.then(chat.present, models, shown, **quiet)
    from_data.click(chat.training_pairs, first, pairs, **quiet).then(
        None, pairs, js="jetsonFt.chat.addPairs"
    )
