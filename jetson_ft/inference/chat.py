"""A conversation with a model: base, adapter, or both side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetson_ft.data.formats import Message, RowError, detect, normalise
from jetson_ft.data.template import encode_prompt, end_ids
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling, stream
from jetson_ft.models import adapter, libraries, load, resolve
from jetson_ft.models.load import Weights
from jetson_ft.paths import disk_errors

Messages = list[Message]


@dataclass
class Chat:
    """Turns so far, the system message and few-shot examples before them."""

    model: Any
    tokenizer: Any
    has_adapter: bool
    max_context: int
    system: str = ""
    examples: Messages = field(default_factory=list)
    turns: Messages = field(default_factory=list)

    def reset(self) -> None:
        """Forgets the turns; system message and examples stay."""
        self.turns.clear()

    def messages(self, text: str) -> Messages:
        """Everything the model is shown before it answers `text`."""
        system = [Message(role="system", content=self.system)] if self.system else []
        return [*system, *self.examples, *self.turns, Message(role="user", content=text)]

    def reply(
        self,
        text: str,
        sampling: Sampling,
        use_adapter: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Streams the answer to `text`; the turns are left as they are (see `keep`).

        Raises:
            UserError: the conversation has outgrown the model's context.
        """
        prompt = encode_prompt(self.tokenizer, self.messages(text))
        if len(prompt) + sampling.max_new_tokens > self.max_context:
            raise UserError(
                f"The conversation has {len(prompt)} tokens; with the answer that is more than "
                f"the model's {self.max_context}.",
                fix="/reset begins a new one; fewer examples or a smaller max_new_tokens help too.",
            )
        off = self.has_adapter and not use_adapter
        with self.model.disable_adapter() if off else nullcontext():
            ends = end_ids(self.tokenizer, self.model)
            yield from stream(self.model, self.tokenizer, prompt, ends, sampling, stopped)

    def keep(self, text: str, answer: str) -> None:
        """Makes a question and its answer part of the conversation."""
        self.turns += [
            Message(role="user", content=text),
            Message(role="assistant", content=answer.strip()),
        ]


def open_chat(model_name: str, weights: Weights, device: str, folder: Path | None) -> Chat:
    """Loads the base and, if a folder is given, its adapter."""
    base = resolve.resolve(model_name)
    if folder is not None:
        adapter.check_folder(folder)
    libraries.load()
    tokenizer = load.load_tokenizer(base)
    model = load.load_model(base, weights, device)
    if folder is not None:
        model = adapter.load(model, base, folder)
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    return Chat(model, tokenizer, folder is not None, int(limit))


def read_examples(path: Path) -> Messages:
    """Few-shot examples: JSON rows with `messages`, or `instruction`/`output` pairs.

    Raises:
        UserError: unreadable, or no rows of that kind.
    """
    with disk_errors(path):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
        messages: Messages = []
        for row in rows:
            layout = detect(row)
            if layout is None:
                raise RowError("a row without question and answer")
            messages += [m for m in normalise(row, layout) if m["role"] != "system"]
    except (ValueError, RowError, AttributeError, TypeError) as error:
        raise UserError(
            f"These are no examples: {error}.",
            str(path),
            'One row a line: {"instruction": "…", "output": "…"}',
        ) from error
    return messages


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]
