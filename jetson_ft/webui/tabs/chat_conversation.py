"""What the Chat tab's buttons do."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jetson_ft.chat import target
from jetson_ft.chat.client import ChatClient, ChatReply, ChatRequest
from jetson_ft.chat.session import parse_examples
from jetson_ft.errors import UserError, _
from jetson_ft.files import printable
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.chat_models import BASE, NONE, OWN_BASE, ChatModels
from jetson_ft.webui.tabs.chat_sampling import read_sampling
from jetson_ft.webui.tabs.chat_turns import Messages, Turn, align, dialogue, read_turns, show_turns

_SHOW_SECONDS = 0.1  # a browser draws all of both conversations again each time
SECOND_PANE = "chat-b"  # the element of the model that is compared
Outputs = tuple[Any, Messages, Messages, str]  # the composer, both panes, the status line


class ChatTab:
    """The functions behind the components; each event's `form` is what `_Form` reads."""

    def __init__(
        self, t: Locale, runs: Path, client: ChatClient, allowed: AllowedPaths = EVERY_PATH
    ) -> None:
        self.t, self.runs, self.client = t, runs, client
        self.models = ChatModels(t, runs, allowed)

    def open(self, first: str, second: str, wanted: str, pane: Messages) -> tuple[Any, Any, str]:
        """Return updates of both choices when the tab is opened.

        Args:
            wanted: the model that a link to the tab names; empty: none.
        """
        name = wanted or first or self.models.newest()
        if not pane:
            try:
                target.resolve_target(self.models.require(name), self.runs)
            except UserError:  # deleted since it was chosen
                name = self.models.newest()
        return (*self._show_models(name, second if name == first else NONE), "")

    def refresh(self, first: str) -> tuple[Any, Any]:
        """Return updates of both lists of models, which may have changed on the disk.

        The values stay: another one may be chosen before the updates arrive.
        """
        choices = self.models.choices()
        compared = self.models.compared_choices(first, choices)
        return gr.update(choices=choices), gr.update(choices=compared)

    def _show_models(self, first: str, second: str) -> tuple[Any, Any]:
        """Return updates of both lists of models with what is chosen there."""
        first_update, second_update = self.refresh(first)
        second = self._compared(first, second)
        return first_update | {"value": first}, second_update | {"value": second}

    def present(self, first: str, second: str) -> tuple[Any, Any, str]:
        """Return updates of the panes' titles and of the status line; conversations stay."""
        starters: Any = [{"text": text} for text in self.models.starters(first)]
        title = self.models.title(first)
        note = ""
        if self.models.are_alternating(first, second):
            note = self.t(_("These two take turns in memory: each answer first loads its model."))
        return (
            gr.Chatbot(label=title, examples=starters),
            gr.Chatbot(label=self.models.title(second, first), visible=second != NONE),
            _status(note),
        )

    def _compared(self, first: str, second: str) -> str:
        """Return the model to compare with: none, where it is the same one."""
        is_same = second == first or (second == OWN_BASE and self.models.is_base(first))
        return NONE if is_same else second or NONE

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being generated for this page."""
        self.client.stop(str(request.session_hash))

    def end(self, request: gr.Request) -> Any:
        """End the answer whose event was cancelled; return an update of the composer."""
        self.stop(request)
        return self._composer(None)

    def choose(self, request: gr.Request, first: str, second: str) -> tuple[Any, ...]:
        """Begin a new conversation with other models."""
        return (self.end(request), *self._show_models(first, second), [], [])

    def training_pairs(self, first: str) -> str:
        """Return three questions with answers from the data of the first model's run, as JSON."""
        try:
            return json.dumps(self.client.training_pairs(self.models.require_data(first)))
        except UserError as error:
            self._warn(error)
            return "[]"

    def send(self, request: gr.Request, *form: Any) -> Iterator[Outputs]:
        """Yield the outputs while the answers to the composer's text are generated."""
        page = _Form(*form)
        if not page.text.strip():
            yield gr.skip(), *page.messages, ""
            return
        yield self._composer("", is_busy=True), *page.messages, ""
        yield from self._ask(request, page, len(page.turns[0]), page.text.strip())

    def start(self, request: gr.Request, event: gr.SelectData, *form: Any) -> Iterator[Outputs]:
        """Ask one of the questions that an empty conversation offers."""
        yield from self._ask(request, _Form(*form), 0, str(event.value["text"]))

    def edit(self, request: gr.Request, event: gr.EditData, *form: Any) -> Iterator[Outputs]:
        """Ask a question again in other words; what followed it is removed from both panes."""
        page = _Form(*form)
        number = page.turn_of(_pane_of(event), event.index)
        yield from self._ask(request, page, number, str(event.value))

    def retry(self, request: gr.Request, event: gr.RetryData, *form: Any) -> Iterator[Outputs]:
        """Give the last answer of a pane again."""
        page, pane = _Form(*form), _pane_of(event)
        yield from self._retry(request, page, pane, page.turn_of(pane, event.index))

    def retry_any(self, request: gr.Request, place: str, *form: Any) -> Iterator[Outputs]:
        """Give any answer again.

        Args:
            place: the numbers of its pane and of its turn, with a comma between them.
        """
        page = _Form(*form)
        places = {
            f"{pane},{number}": (pane, number)
            for pane, turns in enumerate(page.turns) for number in range(len(turns))
        }  # fmt: skip
        if place in places:
            yield from self._retry(request, page, *places[place])
        else:
            yield gr.skip(), *page.messages, ""

    def _retry(self, request: gr.Request, page: _Form, pane: int, number: int) -> Iterator[Outputs]:
        """Answer a question again in one pane; what followed it is removed from both."""
        panes = [turns[: number + 1] for turns in page.turns]
        panes[pane][number] = Turn(panes[pane][number].question)
        yield from self._answer(request, page, panes, [pane])

    def proceed(self, request: gr.Request, event: gr.SelectData, *form: Any) -> Iterator[Outputs]:
        """Continue the last answer of a pane, or answer there what was not answered."""
        page, pane = _Form(*form), _pane_of(event)
        if page.turns[pane]:
            yield from self._answer(request, page, page.turns, [pane])

    def _ask(self, request: gr.Request, page: _Form, number: int, text: str) -> Iterator[Outputs]:
        """Put a question after so many turns, and answer it in each pane that is shown."""
        panes = [[*turns[:number], Turn(text)] for turns in page.turns]
        shown = [0, 1] if page.second != NONE else [0]
        yield from self._answer(request, page, panes, shown)

    def _answer(
        self, request: gr.Request, page: _Form, panes: Sequence[list[Turn]], numbers: Sequence[int]
    ) -> Iterator[Outputs]:
        """Generate the last answer of these panes; after an error, keep what there is.

        A pane's last turn that has an answer already is continued.
        """
        done = [number not in numbers for number in (0, 1)]

        def outputs(status: str, composer: Any) -> Outputs:
            first, second = (
                show_turns(self.t, turns, is_done)
                for turns, is_done in zip(panes, done, strict=True)
            )
            return composer, first, second, _status(status)

        has_begun = False
        try:
            sampling = read_sampling(page.seed, page.sliders)
            few_shot = parse_examples(page.examples, self.t(_("Few-shot examples")))
            first = self.models.require(page.first)
            names = [(first, True), (first, False)]  # the latter of the own base
            if page.second not in (NONE, OWN_BASE):
                names[1] = self.models.require(page.second), True
            for number in numbers:
                *before, turn = panes[number]
                name, use_adapter = names[number]
                chat = ChatRequest(
                    turn.question, dialogue(before), sampling, page.system, few_shot, use_adapter,
                    turn.answer,
                )  # fmt: skip
                title = self.models.title(page.second if number else page.first, page.first)
                turn.note, turn.is_cut = "", False
                loading = self.t(_("Loading {model} …"), model=title)
                yield outputs(loading, self._composer(None, is_busy=True))
                reply, shown_at = None, -math.inf
                for reply in self.client.generate(name, chat, str(request.session_hash)):
                    has_begun = True
                    turn.answer = printable(reply.text)
                    if time.monotonic() - shown_at < _SHOW_SECONDS:
                        continue
                    shown_at = time.monotonic()
                    answering = self.t(_("{model} is answering …"), model=title)
                    yield outputs(answering, gr.skip())  # a new Stop button would lose its click
                if reply:
                    turn.note, turn.is_cut = self._note(reply), not reply.ended
                done[number] = True
                if reply and reply.stopped:
                    break
            done = [True, True]
            yield outputs("", self._composer(None))
        except UserError as error:
            self._warn(error)
            done = [True, True]
            if has_begun:
                yield outputs("", self._composer(None))
            else:
                yield self._composer(page.text), *page.messages, ""

    def _note(self, reply: ChatReply) -> str:
        """Return what is shown under an answer."""
        note = self.t(_("{tokens} tokens"), tokens=reply.tokens)
        if reply.tokens and reply.seconds:
            rate = reply.tokens / reply.seconds
            text = _("{rate:.0f}/s") if rate >= 10 else _("{rate:.1f}/s")
            note = f"{note} · {self.t(text, rate=rate)}"
        if reply.stopped:
            return f"{note} · {self.t(_('stopped'))}"
        return note if reply.ended else f"{note} · {self.t(_('cut short'))}"

    def _composer(self, text: str | None, is_busy: bool = False) -> Any:
        """Return an update of the composer, with Send or Stop; None: its text stays."""
        send, stop = self.t(_("Send")), self.t(_("Stop"))
        value: dict[str, Any] = {} if text is None else {"value": text}
        return gr.update(
            submit_btn=False if is_busy else send, stop_btn=stop if is_busy else False, **value
        )

    def _warn(self, error: UserError) -> None:
        gr.Warning(escape(self.t(error)), duration=15)  # which is shown as HTML


class _Form:
    """The values that all events of a conversation receive."""

    def __init__(
        self, first: str, second: str, text: str, pane: Messages, second_pane: Messages,
        system: str, examples: str, seed: str, *sliders: Any,
    ) -> None:  # fmt: skip
        self.first, self.second, self.text = first or BASE, second or NONE, text or ""
        self.system, self.examples, self.seed = system or "", examples or "", seed or ""
        self.sliders = sliders
        turns = read_turns(pane)
        questions = [turn.question for turn in turns]
        self.turns = [turns, align(read_turns(second_pane), questions)]
        self.messages = _plain(pane), _plain(second_pane)

    def turn_of(self, pane: int, index: Any) -> int:
        """Return which turn has the message at that place of a pane."""
        place = int(index[0] if isinstance(index, list | tuple) else index)
        roles = [message["role"] for message in self.messages[pane][: place + 1]]
        return max(0, min(roles.count("user"), len(self.turns[pane])) - 1)


def _plain(messages: Messages) -> Messages:
    """Return the messages as they were shown, without what a request may have added."""
    return show_turns(Locale("en"), read_turns(messages))


def _pane_of(event: gr.EventData) -> int:
    return int(event.target is not None and event.target.elem_id == SECOND_PANE)


def _status(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>' if text else ""
