"""The Chat tab: a base model or an adapter, or both side by side with the same messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from jetson_ft import hub
from jetson_ft.chat import target
from jetson_ft.chat.client import ChatClient, ChatRequest, ChatTurns
from jetson_ft.chat.session import parse_examples
from jetson_ft.errors import UserError, _
from jetson_ft.files import printable
from jetson_ft.inference.generate import Sampling
from jetson_ft.models import files
from jetson_ft.runs import store
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale

# Sampling setting -> label.
_LABELS = {
    "max_new_tokens": _("Longest answer (tokens)"),
    "temperature": _("Temperature (0: greedy)"),
    "top_k": _("Top-k"),
    "top_p": _("Top-p"),
    "repetition_penalty": _("Repetition penalty"),
}
# The sampling settings with a slider.
_SLIDERS: list[Any] = [option for option in fields(Sampling) if "min" in option.metadata]
BASE = "base"
_CHATBOT = partial(
    gr.Chatbot, height=460, render_markdown=False, feedback_options=None, buttons=["copy"]
)


def build(
    t: Locale, runs: Path, client: ChatClient, page: Any, tab: Any, allowed: AllowedPaths
) -> None:
    """Add the tab's components."""
    chat = ChatTab(t, runs, client, allowed)
    chosen_by_user = gr.State(False)
    with gr.Row():
        with gr.Column(scale=3):
            name = gr.Dropdown(
                chat.choices(), value=BASE, label=t(_("Chat with")),
                info=t(_("A run's adapter or a base model. Or type a Hub id, or the folder of a "
                         "model or an adapter.")),
                allow_custom_value=True,
            )  # fmt: skip
            side_by_side = gr.Checkbox(label=t(_("Base and adapter side by side")))
            with gr.Row():
                base = _CHATBOT(label=t(_("Base")), visible=False)
                adapter = _CHATBOT(label=chat.title(BASE))
            speed = gr.HTML()
            message = gr.Textbox(
                show_label=False, container=False, placeholder=t(_("Ask something …")),
                submit_btn=t(_("Send")),
            )  # fmt: skip
            with gr.Row():
                labels = _("Stop"), _("Again"), _("Undo"), _("Clear"), _("Transcript")
                stop, again, undo, clear, download = (
                    gr.Button(t(label), size="sm", min_width=80) for label in labels
                )
        with gr.Column(scale=1, min_width=240), gr.Accordion(t(_("Generation")), open=True):
            system = gr.Textbox(label=t(_("System message")), lines=2)
            sliders = [
                gr.Slider(
                    option.metadata["min"], option.metadata["max"], option.default,
                    step=option.metadata["step"], label=t(_LABELS[option.name]),
                    elem_id=f"chat-{option.name}",
                )
                for option in _SLIDERS
            ]  # fmt: skip
            seed = gr.Textbox(label=t(_("Seed (empty: none)")))
            examples = gr.Textbox(
                label=t(_("Few-shot examples")), lines=3,
                info=t(_('One per line: {{"instruction": "…", "output": "…"}}')),
            )  # fmt: skip
    inputs = [name, side_by_side, message, base, adapter, system, examples, seed, *sliders]
    outputs = [message, base, adapter, speed]
    answers: Any = [
        message.submit(chat.send, inputs, outputs, concurrency_limit=None),
        again.click(chat.again, inputs, outputs, concurrency_limit=None),
    ]
    undo.click(chat.undo, [base, adapter], [message, base, adapter])
    clear.click(chat.clear, None, [base, adapter, speed], cancels=answers)
    stop.click(chat.stop)
    tab.select(chat.open, [name, chosen_by_user, adapter], name)
    name.focus(lambda: gr.Dropdown(choices=chat.choices()), None, name)
    name.input(lambda: True, None, chosen_by_user)
    name.change(chat.choose, name, [base, adapter, speed], cancels=answers)
    side_by_side.change(lambda on: gr.Chatbot(visible=on), side_by_side, base)
    download.click(None, [name, base, adapter], js="jetsonFt.transcript")


class ChatTab:
    """What the chat's buttons do."""

    def __init__(
        self, t: Locale, runs: Path, client: ChatClient, allowed: AllowedPaths = EVERY_PATH
    ) -> None:
        self.t, self.runs, self.client, self.allowed = t, runs, client, allowed

    def choices(self) -> list[tuple[str, str]]:
        """Return (label, name) of every run with an adapter and every downloaded base model."""
        runs = store.runs_with_adapter(self.runs)
        adapters = [(printable(run.title()), run.name) for run in runs]
        label = _("{model}, no adapter")
        bases = [(self.t(label, model=name), name) for name in hub.downloaded_models()]
        return [(self.t(_("embedded model, no adapter")), BASE), *adapters, *bases]

    def open(self, name: str, chosen_by_user: bool, turns: ChatTurns) -> Any:
        """Return an update of the choices; choose the newest adapter until the user has chosen."""
        try:
            target.resolve_target(self._allowed(name), self.runs)
            keep = chosen_by_user or bool(turns)
        except UserError:
            keep = False
        if not keep:
            name = next((run.name for run in store.runs_with_adapter(self.runs)), BASE)
        return gr.Dropdown(self.choices(), value=name, allow_custom_value=True)

    def stop(self, request: gr.Request) -> None:
        self.client.stop(str(request.session_hash))

    def clear(self, request: gr.Request) -> tuple[ChatTurns, ChatTurns, str]:
        """Stop the answer and return empty conversations."""
        self.stop(request)
        return [], [], ""

    def choose(self, request: gr.Request, name: str) -> tuple[ChatTurns, Any, str]:
        """Start a new conversation with another model, under its title."""
        base, _adapter, speed = self.clear(request)
        return base, gr.Chatbot([], label=self.title(name)), speed

    def title(self, name: str) -> str:
        """Return the title of a model's conversation."""
        try:
            is_base = files.is_base_model(self._allowed(name))
        except UserError:
            is_base = False
        return self.t(_("Base")) if is_base else self.t(_("Adapter"))

    def _allowed(self, name: str) -> str:
        """Return the name unchanged; raise `UserError` for a path that may not be named."""
        if self.allowed.folders is None or name in ("latest", BASE):
            return name
        if name not in [run.name for run in store.list_runs(self.runs)]:
            resolved = target.resolve_target(self.allowed.require(name), self.runs)
            if resolved.named_in:  # the folder of an adapter, whose files may be uploads
                self.allowed.require(resolved.recipe.model)
        return name

    def send(self, request: gr.Request, *form: Any) -> Iterator[tuple[Any, ...]]:
        """Yield the outputs while the answers are generated, the base model's first."""
        yield from self._answer(False, request, *form)

    def again(self, request: gr.Request, *form: Any) -> Iterator[tuple[Any, ...]]:
        """Answer the last message again."""
        yield from self._answer(True, request, *form)

    def _answer(
        self, again: bool, request: gr.Request, name: str, side_by_side: bool, text: str,
        base: ChatTurns, adapter: ChatTurns, system: str, examples: str, seed: str, *values: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Stream the answers; after an error, restore the message and the conversations."""
        shown = _plain(base), _plain(adapter)
        last, *before = self.undo(*shown) if again else ("", *shown)
        text = last or text.strip()
        if not text:
            yield "", *shown, ""
            return
        turns = dict(zip(("base", "adapter"), before, strict=True))
        speed = ""
        try:
            both = not files.is_base_model(self._allowed(name)) and side_by_side
            sampling = _sampling(seed, values)
            few_shot = parse_examples(examples, self.t(_("Few-shot examples")))
            for side in ("base", "adapter") if both else ("adapter",):
                chat = ChatRequest(text, turns[side], sampling, system, few_shot, side == "adapter")
                asked = turns[side] = [*turns[side], {"role": "user", "content": text}]
                yield "", *turns.values(), self.t(_("Loading the model …"))
                reply = None
                for reply in self.client.generate(name, chat, str(request.session_hash)):
                    turns[side] = [*asked, {"role": "assistant", "content": printable(reply.text)}]
                    if reply.tokens and reply.seconds:
                        rate = reply.tokens / reply.seconds
                        note = _("{tokens} tokens, {rate:.1f} tokens/s")
                        note = self.t(note, tokens=reply.tokens, rate=rate)
                        speed = f'<p class="small">{note}</p>'
                    yield "", *turns.values(), speed
                if reply and reply.stopped:
                    return
        except UserError as error:
            gr.Warning(escape(self.t(error)), duration=15)  # which is shown as HTML
            yield text, *shown, ""

    @staticmethod
    def undo(base: ChatTurns, adapter: ChatTurns) -> tuple[str, ChatTurns, ChatTurns]:
        """Return the last message and both conversations without it and its answers.

        The base's conversation is unchanged where it does not end with that message.
        """
        base, adapter = _plain(base), _plain(adapter)
        message, adapter = _without_last(adapter)
        base_message, base_before = _without_last(base)
        return message, base_before if base_message == message else base, adapter


def _sampling(seed: str, values: Sequence[Any]) -> Sampling:
    """Return the settings of the sliders and the seed's field."""
    settings = {option.name: value for option, value in zip(_SLIDERS, values, strict=True)}
    if seed and seed.strip():
        if not re.fullmatch(r"[0-9]{1,19}", seed.strip()):
            raise UserError(_("The seed must be a whole number."), seed)
        settings["seed"] = int(seed)
    return Sampling(**settings)


def _plain(turns: ChatTurns) -> ChatTurns:
    """Return the text of Gradio's messages alone.

    A file in a request must not be returned: Gradio copies each file that it sends to where it can
    be fetched.
    """
    plain = []
    for turn in turns:
        content: Any = turn["content"]
        if not isinstance(content, str):
            parts = content if isinstance(content, list) else []
            content = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
        plain.append({"role": turn["role"], "content": content})
    return plain


def _without_last(turns: ChatTurns) -> tuple[str, ChatTurns]:
    """Return the last user message and the turns before it."""
    for position in reversed(range(len(turns))):
        if turns[position]["role"] == "user":
            return turns[position]["content"], turns[:position]
    return "", []
