"""Ollama's Modelfile: the chat template in Go's template language, stop words and parameters.

The template is not translated as text. A few conversations are rendered by the model's own chat
template; the texts between their messages are the parts of the Go template, if they are the same in
each place. Checked so, it needs no table of known templates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft.data.conversation import prepare_conversation
from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import UserError
from jetson_ft.export.gguf import all_end_ids
from jetson_ft.files import quoted, write_atomic
from jetson_ft.inference.generate import Sampling
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import load_tokenizer

FILE = "Modelfile"
_TURNS = ("user", "assistant", "user", "assistant", "user")


@dataclass(frozen=True)
class ChatParts:
    """The texts around the messages of a conversation; `surroundings` has those by role."""

    start: str  # before a first message that is not the system's: a default system message, or ""
    surroundings: dict[str, tuple[str, str]]  # role -> before and after the content
    reply: str  # what the reply begins with
    # Between the system's text and the first user's, where both are one turn; else None.
    system_separator: str | None

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return the text of a conversation, as `go_template` does in Ollama."""
        text = "" if messages[0]["role"] == "system" else self.start
        for index, message in enumerate(messages):
            content = message["content"]
            if self.system_separator is not None:
                if message["role"] == "system":
                    continue
                if index == 1 and messages[0]["role"] == "system":
                    content = messages[0]["content"] + self.system_separator + content
            before, after = self.surroundings[message["role"]]
            text += before + content + after
        return text + self.reply

    def go_template(self) -> str:
        """Return the template; Ollama defines `.Messages` and `.System`."""
        roles = {}
        for role, (before, after) in self.surroundings.items():
            roles[role] = f"{before}{{{{ .Content }}}}{after}"
        if self.system_separator is not None:
            before, after = self.surroundings["user"]
            system = f"{{{{ if and $.System (eq $i 1) }}}}{{{{ $.System }}}}{self.system_separator}"
            roles["user"] = f"{before}{system}{{{{ end }}}}{{{{ .Content }}}}{after}"
        start = f"{{{{ if not $.System }}}}{self.start}{{{{ end }}}}" if self.start else ""
        turns = "{{ else }}".join(
            f'{{{{ if eq .Role "{role}" }}}}{text}' for role, text in roles.items()
        )
        turns += "{{ end }}" * len(roles)
        return f"{start}{{{{ range $i, $_ := .Messages }}}}{turns}{{{{ end }}}}{self.reply}"


def write_modelfile(folder: Path, gguf_name: str, model: Path) -> None:
    """Write `Modelfile` for `ollama create NAME -f Modelfile`.

    Args:
        gguf_name: name of the model's file in the folder.
        model: folder with the tokenizer, the chat template and the generation config.
    """
    tokenizer = load_tokenizer(BaseModelFiles(model.name, model))
    lines = [f"FROM ./{gguf_name}"]
    parts = chat_parts(tokenizer)
    if parts:
        lines.append(f'TEMPLATE """{parts.go_template()}"""')
    else:
        lines.append(
            "# The chat template can't be written in Ollama's language. Ollama takes the one in\n"
            "# the GGUF file where it knows it; compare its replies with `jetson-ft chat`."
        )
    for text in tokenizer.convert_ids_to_tokens(all_end_ids(tokenizer, model)):
        lines.append(f'PARAMETER stop "{text}"')
    chat = Sampling()  # of `jetson-ft chat`
    lines += [
        f"PARAMETER temperature {chat.temperature:g}",
        f"PARAMETER top_k {chat.top_k}",
        f"PARAMETER top_p {chat.top_p:g}",
        f"PARAMETER repeat_penalty {chat.repetition_penalty:g}",
    ]
    write_atomic(folder / FILE, "\n".join(lines) + "\n")


def ollama_command(run: str, folder: Path) -> str:
    """Return the command that makes an Ollama model of a run's export with a Modelfile."""
    name = f"{run}-{folder.name.removeprefix('gguf-')}".lower()
    return f"ollama create {quoted(name)} -f {quoted(str(folder / FILE))}"


def chat_parts(tokenizer: Any) -> ChatParts | None:
    """Return the parts of the tokenizer's chat template; None: it can't be taken apart so.

    The start token is left out: Ollama adds it where the GGUF file says that texts begin with it.
    """
    conversations = [
        [
            ChatMessage(role=role, content=f"Text{i}")
            for i, role in enumerate(_TURNS[: count * 2 - 1])
        ]
        for count in (1, 2, 3)
    ]
    system = ChatMessage(role="system", content="Rules")
    try:
        texts = [_render(tokenizer, messages) for messages in conversations]
    except UserError:
        return None
    try:
        with_system = [_render(tokenizer, [system, *messages]) for messages in conversations]
    except UserError:
        with_system = []  # the template refuses such messages
    for separator in _separators(with_system):
        parts = _take_apart(texts, with_system, separator)
        if parts is None or re.search(r'\{\{|\}\}|"""', str(parts)):
            continue
        pairs = list(zip(conversations, texts, strict=True))
        if with_system:
            pairs += [
                ([system, *messages], text)
                for messages, text in zip(conversations, with_system, strict=True)
            ]
        if all(parts.render(messages) == text for messages, text in pairs):
            return parts
    return None


def _render(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    """Return the text up to where a reply begins, without the start token."""
    text = str(prepare_conversation(tokenizer, messages, "").prompt(len(messages)))
    return text.removeprefix(tokenizer.bos_token or "")


def _separators(with_system: Sequence[str]) -> list[str | None]:
    """Return None, and what stands between the system's text and the first user's."""
    if not with_system:
        return [None]
    between = with_system[0].partition("Rules")[2].partition("Text0")[0]
    return [None, between]


def _take_apart(
    texts: Sequence[str], with_system: Sequence[str], separator: str | None
) -> ChatParts | None:
    """Return the parts by the rendering of one and two questions, with and without a system."""
    one, two = texts[:2]
    before_first, _content, after_first = one.partition("Text0")
    # Text0 | after the question, before the answer | Text1 | after it, before Text2 | Text2 | reply
    between = re.split(r"Text\d", two)
    if len(between) != 4 or between[3] != after_first:
        return None
    # What precedes the second question and ends what precedes the first is the question's own.
    common = 0
    while common < min(len(before_first), len(between[2])) and (
        before_first[-1 - common] == between[2][-1 - common]
    ):
        common += 1
    before_user = before_first[len(before_first) - common :]
    start, after_answer = before_first[: len(before_first) - common], between[2][: -common or None]
    # The reply begins as an earlier answer does, perhaps with more (an empty thought).
    for length in range(len(after_first) + 1):
        after_user, reply = after_first[:length], after_first[length:]
        if not between[1].startswith(after_user):
            break
        before_answer = between[1][length:]
        if reply.startswith(before_answer):
            return _with_system(
                ChatParts(
                    start,
                    {"user": (before_user, after_user), "assistant": (before_answer, after_answer)},
                    reply,
                    separator,
                ),
                with_system,
            )
    return None


def _with_system(parts: ChatParts, with_system: Sequence[str]) -> ChatParts | None:
    """Return the parts with the texts around a system's message, where it is a turn of its own."""
    if not with_system or parts.system_separator is not None:
        return parts
    before, _rules, rest = with_system[0].partition("Rules")
    before_user, _after = parts.surroundings["user"]
    after = rest.partition("Text0")[0]
    if not after.endswith(before_user):
        return None
    parts.surroundings["system"] = (before, after.removesuffix(before_user))
    return parts
