"""The chat: a base or an adapter, or both side by side from one message."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft import hub
from jetson_ft.errors import UserError
from jetson_ft.models import resolve
from jetson_ft.runs import live, rundir, talk
from jetson_ft.runs.parlour import Parlour, Question, Turns
from jetson_ft.runs.rundir import Run
from jetson_ft.webui.library import gr
from jetson_ft.webui.words import Words

# As `inference.generate.Sampling` declares them: lowest, highest, step, what the chat begins with.
_SLIDERS = {
    "max_new_tokens": (1, 1024, 1, 256),
    "temperature": (0.0, 2.0, 0.05, 0.0),
    "top_k": (0, 200, 1, 50),
    "top_p": (0.05, 1.0, 0.05, 1.0),
    "repetition_penalty": (1.0, 2.0, 0.05, 1.1),
}
BASE = "base"


def build(words: Words, runs: Path, parlour: Parlour, page: Any, place: Any) -> None:
    """Puts the chat into its place, a tab of the page."""
    tab = _Tab(words, runs, parlour)
    by_hand = gr.State(False)  # whether the visitor chose with whom to talk
    with gr.Row():
        with gr.Column(scale=3):
            name = gr.Dropdown(
                tab.choices(), value=BASE, label=words("chat.with"), info=words("chat.with.help"),
                allow_custom_value=True,
            )  # fmt: skip
            side = gr.Checkbox(label=words("chat.side"))
            with gr.Row():
                base = gr.Chatbot(label=words("chat.base.title"), visible=False, **_CHATBOT)
                adapter = gr.Chatbot(label=tab.title(BASE), **_CHATBOT)
            speed = gr.HTML()
            message = gr.Textbox(
                show_label=False, container=False, placeholder=words("chat.placeholder"),
                submit_btn=words("chat.send"),
            )  # fmt: skip
            with gr.Row():
                stop, again, undo, clear = (
                    gr.Button(words(f"chat.{what}"), size="sm", min_width=80)
                    for what in ("stop", "again", "undo", "clear")
                )
                download = gr.Button(words("chat.download"), size="sm", min_width=80)
        with gr.Column(scale=1, min_width=240), gr.Accordion(words("chat.settings"), open=True):
            system = gr.Textbox(label=words("chat.system"), lines=2)
            sliders = [
                gr.Slider(
                    low, high, start, step=step, label=words(f"chat.{key}"), elem_id=f"chat-{key}"
                )
                for key, (low, high, step, start) in _SLIDERS.items()
            ]
            seed = gr.Textbox(label=words("chat.seed"))
            examples = gr.Textbox(
                label=words("chat.examples"), info=words("chat.examples.help"), lines=3
            )
    inputs = [name, side, message, base, adapter, system, examples, seed, *sliders]
    outputs = [message, base, adapter, speed]
    writing: Any = [
        message.submit(tab.send, inputs, outputs, concurrency_limit=None),
        again.click(tab.again, inputs, outputs, concurrency_limit=None),
    ]
    undo.click(tab.undo, [base, adapter], [message, base, adapter])
    clear.click(tab.clear, None, [base, adapter, speed], cancels=writing)
    stop.click(tab.stop)
    page.unload(tab.stop)
    place.select(tab.arrive, [name, by_hand, adapter], name)
    name.focus(lambda: gr.Dropdown(choices=tab.choices()), None, name)
    name.input(lambda: True, None, by_hand)
    name.change(tab.choose, name, [base, adapter, speed], cancels=writing)
    side.change(lambda on: gr.Chatbot(visible=on), side, base)
    download.click(None, [name, base, adapter], js="jetsonFt.transcript")


_CHATBOT: dict[str, Any] = {
    "height": 460, "render_markdown": False, "feedback_options": None, "buttons": ["copy"],
}  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """A message, and whom it goes to."""

    visitor: str
    name: str
    side: bool
    text: str
    how: Sequence[Any]  # the settings, in the order of the form

    @property
    def whom(self) -> tuple[str, ...]:
        """The conversations that get an answer, in order."""
        return ("base", "adapter") if self.side and not resolve.is_base(self.name) else ("adapter",)


class _Tab:
    """What the chat's buttons do."""

    def __init__(self, words: Words, runs: Path, parlour: Parlour) -> None:
        self.words, self.runs, self.parlour = words, runs, parlour

    def choices(self) -> list[tuple[str, str]]:
        """(shown, name) of every run with an adapter, and of the bases that lie here."""
        adapters = [(live.title(run), run.name) for run in self._with_adapter()]
        bases = [(self.words("chat.alone", name=name), name) for name in hub.downloaded_models()]
        return [(self.words("chat.base"), BASE), *adapters, *bases]

    def _with_adapter(self) -> list[Run]:
        return [run for run in rundir.list_runs(self.runs) if run.adapter.is_dir()]

    def arrive(self, name: str, by_hand: bool, turns: Turns) -> Any:
        """Offers what there is by now; the newest adapter until somebody chooses or talks."""
        chosen = (by_hand or turns) and self._is_there(name)
        value = name if chosen else [*(run.name for run in self._with_adapter()), BASE][0]
        return gr.Dropdown(self.choices(), value=value, allow_custom_value=True)

    def _is_there(self, name: str) -> bool:
        try:
            talk.find(name, self.runs)
        except UserError:
            return False
        return True

    def stop(self, request: gr.Request) -> None:
        """Ends this visitor's answer, and nobody else's."""
        self.parlour.stop(str(request.session_hash))

    def clear(self, request: gr.Request) -> tuple[Turns, Turns, str]:
        """Forgets both conversations, and the answer that is being written."""
        self.stop(request)
        return [], [], ""

    def choose(self, request: gr.Request, name: str) -> tuple[Turns, Any, str]:
        """Somebody else to talk with: a new conversation under its title."""
        base, _, speed = self.clear(request)
        return base, gr.Chatbot([], label=self.title(name)), speed

    def title(self, name: str) -> str:
        """What stands over its conversation."""
        kind = "base" if resolve.is_base(name) else "adapter"
        return self.words(f"chat.{kind}.title")

    def send(
        self,
        request: gr.Request,
        name: str,
        side: bool,
        text: str,
        base: Turns,
        adapter: Turns,
        *how: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Writes the answers one after the other, the base's first."""
        asked = _Asked(str(request.session_hash), name, side, text.strip(), how)
        shown = _plain(base), _plain(adapter)
        yield from self._write(asked, shown, shown)

    def again(
        self,
        request: gr.Request,
        name: str,
        side: bool,
        text: str,
        base: Turns,
        adapter: Turns,
        *how: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """The last message once more."""
        shown = _plain(base), _plain(adapter)
        last, *before = self.undo(*shown)
        asked = _Asked(str(request.session_hash), name, side, last or text.strip(), how)
        yield from self._write(asked, before, shown)

    def _write(
        self, asked: _Asked, before: Sequence[Turns], shown: Sequence[Turns]
    ) -> Iterator[tuple[Any, ...]]:
        """Answers after the turns `before`; what is `shown` comes back where that fails."""
        if not asked.text:
            yield "", *shown, ""
            return
        try:
            yield from self._answers(asked, before)
        except UserError as error:
            gr.Warning(self.words.error_text(error), duration=15)
            yield asked.text, *shown, ""

    def _answers(self, asked: _Asked, before: Sequence[Turns]) -> Iterator[tuple[Any, ...]]:
        sides = {"base": before[0], "adapter": before[1]}
        speed = ""
        for who in asked.whom:
            question = self._question(asked.text, sides[who], who == "adapter", *asked.how)
            sides[who] = [*sides[who], {"role": "user", "content": asked.text}]
            yield "", *sides.values(), self.words("chat.loading")
            so_far, stopped = sides[who], False
            for answer in self.parlour.answer(asked.name, question, asked.visitor):
                sides[who] = [*so_far, {"role": "assistant", "content": answer.text}]
                stopped = answer.stopped
                if answer.tokens and answer.seconds:
                    speed = self._speed(answer.tokens, answer.seconds)
                yield "", *sides.values(), speed
            if stopped:
                return

    @staticmethod
    def undo(base: Turns, adapter: Turns) -> tuple[str, Turns, Turns]:
        """Takes the last message and its answers back; the message can be changed.

        The base's conversation stays where it wasn't asked.
        """
        base, adapter = _plain(base), _plain(adapter)
        (asked, ours), (theirs_asked, theirs) = _without_last(adapter), _without_last(base)
        return asked, theirs if theirs_asked == asked else base, ours

    def _question(
        self, text: str, turns: Turns, adapter: bool, system: str, examples: str, seed: str,
        *values: Any,
    ) -> Question:  # fmt: skip
        sampling = dict(zip(_SLIDERS, values, strict=True))
        if seed.strip():
            if not seed.strip().isdigit():
                raise UserError("The seed must be a whole number.", seed)
            sampling["seed"] = int(seed)
        return Question(text, turns, sampling, system, _examples(examples), adapter)

    def _speed(self, tokens: int, seconds: float) -> str:
        speed = f"{tokens / max(1e-9, seconds):.1f}"
        return f'<p class="small">{self.words("chat.speed", tokens=tokens, speed=speed)}</p>'


def _examples(text: str) -> list[dict[str, str]]:
    from jetson_ft.inference.chat import read_examples

    if not text.strip():
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        found = read_examples(Path(file.name))
    return [{"role": one["role"], "content": one["content"]} for one in found]


def _plain(turns: Turns) -> Turns:
    """Return the text of Gradio's messages alone.

    A file that a request carries must not come back: Gradio copies each file that it sends to
    where it can be fetched.
    """
    return [{"role": turn["role"], "content": _text(turn["content"])} for turn in turns]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _without_last(turns: Turns) -> tuple[str, Turns]:
    """(last message, the turns before it)."""
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    return (turns[asked[-1]]["content"], turns[: asked[-1]]) if asked else ("", [])
