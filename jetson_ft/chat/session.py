"""A conversation with a model, with or without its adapter."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jetson_ft.adapter import adapter_context
from jetson_ft.data import render_template
from jetson_ft.data.chat_template import encode_prompt, end_ids
from jetson_ft.data.formats import ChatMessage, RowError
from jetson_ft.data.json_rows import parse_json
from jetson_ft.data.layouts import detect_layout, to_conversation
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_errors
from jetson_ft.inference.generate import Reply, Sampling, stream_reply
from jetson_ft.recipe import Recipe

DEFAULT_SAMPLING = Sampling()


class _ReplyStopped(Exception):
    """`should_stop` returned True before the first token."""


@dataclass
class ChatSession:
    """A loaded model and the conversation with it.

        chat = load_chat()
        print(chat.ask("你好"))
        for delta in chat.reply("再见"):
            print(delta, end="")

    Args:
        model: a causal language model, or one with PEFT adapters.
        has_adapter: whether replies can be those of an adapter, `adapter_name`. Without one they
            are the base's, also where other conversations have loaded adapters into the model.
        context_length: most tokens of prompt and reply together.
        title: name of the model and adapter, for people.
        system: the system message; may be empty.
        examples: few-shot turns before the conversation.
        turns: questions and answers so far.
        warning: what a person should know about the model.
        recipe: names the base model, and has the adapter's settings.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    has_adapter: bool
    context_length: int
    title: str = ""
    adapter_name: str = "default"
    system: str = ""
    examples: list[ChatMessage] = field(default_factory=list)
    turns: list[ChatMessage] = field(default_factory=list)
    warning: Message | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def ask(
        self, text: str, sampling: Sampling = DEFAULT_SAMPLING, use_adapter: bool = True
    ) -> str:
        """Return the answer to `text`, and add both to the turns; for the rest see `reply`."""
        answer = "".join(self.reply(text, sampling, use_adapter)).strip()
        self.add_turn(text, answer)
        return answer

    def reply(
        self,
        text: str,
        sampling: Sampling = DEFAULT_SAMPLING,
        use_adapter: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        prefill: str = "",
    ) -> Generator[str, None, Reply]:
        """Yield the answer to `text` in deltas; the turns do not change (see `add_turn`).

        The answer ends where the model's context is full. It is returned at the end.

        Args:
            prefill: the beginning of the answer, which is continued; the rest is yielded.
            use_adapter: False: the base model answers.
            should_stop: called after each token, and while the chat template is rendered; True
                ends the answer.

        Raises:
            UserError: the conversation alone fills the model's context, or the chat template
                refuses it or passes a bound.
        """

        def check() -> None:
            if should_stop():
                raise _ReplyStopped

        try:
            with render_template.stop_check(check):
                prompt = encode_prompt(self.tokenizer, self.messages(text))
                ends = end_ids(self.tokenizer, self.model)
        except _ReplyStopped:
            return Reply("", ended=False, tokens=0)
        prefill_ids: list[int] = self.tokenizer(prefill, add_special_tokens=False)["input_ids"]
        left = self.context_length - len(prompt) - len(prefill_ids)
        if left < 1:
            raise context_full(len(prompt) + len(prefill_ids), self.context_length)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, left))
        with adapter_context(self, use_adapter):
            return (
                yield from stream_reply(
                    self.model, self.tokenizer, prompt, ends, sampling, should_stop, prefill_ids
                )
            )

    def messages(self, text: str) -> list[ChatMessage]:
        """Return the prompt for `text`: system message, examples, turns, then `text`."""
        return prompt_messages(self, text)

    def add_turn(self, text: str, answer: str) -> None:
        """Add a question and its answer to the turns."""
        self.turns += [
            ChatMessage(role="user", content=text),
            ChatMessage(role="assistant", content=answer.strip()),
        ]


def prompt_messages(chat: Any, text: str) -> list[ChatMessage]:
    """Return the prompt for `text` in a chat: system message, examples, turns, then `text`."""
    system = [ChatMessage(role="system", content=chat.system)] if chat.system else []
    question = ChatMessage(role="user", content=text)
    messages = [each.copy() for each in (*system, *chat.examples, *chat.turns, question)]
    for message in messages:  # a page can send half of a surrogate pair, which has no bytes
        message["content"] = message["content"].encode(errors="replace").decode()
    return messages


def context_full(tokens: int, limit: int) -> UserError:
    """Return the error of a conversation that leaves no token for a reply."""
    return UserError(
        _("The conversation has {tokens:,} tokens, and the model reads {limit:,} at most."),
        fix=_("Begin a new chat (in a terminal: /reset), or send a shorter message or fewer "
              "examples."),
        tokens=tokens, limit=limit,
    )  # fmt: skip


def read_examples(path: Path) -> list[ChatMessage]:
    """Return the few-shot turns of a file in UTF-8, see `parse_examples`."""
    with disk_errors(path):
        if not path.exists():  # also for a name that no file can have
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        content = path.read_bytes()
    return parse_examples(content.decode(errors="replace"), str(path))


def parse_examples(text: str, where: str) -> list[ChatMessage]:
    """Return few-shot turns from JSON rows with `messages`, or `instruction`/`output` pairs.

    The text holds a JSON list, or one row a line. System messages are left out.

    Raises:
        UserError: the text holds other rows; `where` is its place.
    """
    text = text.removeprefix("\ufeff").lstrip()
    # Only "\n" ends a line: JSON allows U+2028 and others, where `splitlines` splits, in strings.
    lines = [text] if text.startswith("[") else text.split("\n")
    messages: list[ChatMessage] = []
    try:
        for value in map(parse_json, filter(str.strip, lines)):
            for row in value if isinstance(value, list) else [value]:
                if isinstance(row, RowError):
                    raise row
                layout = detect_layout(row) if isinstance(row, dict) else None
                if layout is None or layout == "text":
                    raise RowError(_("a row without question and answer"))
                turns = to_conversation(row, layout).messages
                messages += [turn for turn in turns if turn["role"] != "system"]
    except RowError as error:
        fix = _('One row a line: {{"instruction": "…", "output": "…"}}')
        what = _("The examples can't be read: {error}.")
        raise UserError(what, where, fix, error=error.reason) from error
    return messages
