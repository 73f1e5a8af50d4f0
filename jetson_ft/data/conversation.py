"""A conversation under a model's chat template: its text, where the answers are, what is missing.

The control tokens in the messages are broken, so that only the template writes control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from jetson_ft.data import render_template
from jetson_ft.data.render_template import Request, TemplateError, TemplateLimitError
from jetson_ft.data.template_files import origin
from jetson_ft.data.templates import CHOOSE_TEMPLATE
from jetson_ft.errors import Message, UserError, _

# Halves of surrogate pairs, which no text contains. `BREAK` is put behind the first character of
# each control token in a message's text; `_PROBE` is the content of an answer that isn't there.
BREAK, _PROBE = "\udc00", "\udc01"
_THINKING_TAGS = ("<think>", "</think>")  # answers contain them, whatever the tokenizer says
_THINKING_TAG = re.compile("|".join(map(re.escape, _THINKING_TAGS)))
_CLOSED_THOUGHT = "<think>\n\n</think>\n\n"
_BATCH_CHARACTERS = 1 << 20  # of texts that are rendered together


class Span(NamedTuple):  # of an answer in the rendered text, in characters
    start: int
    end: int
    turn_end: int


@lru_cache(maxsize=1)
def _control_tokens(tokenizer: Any, size: int) -> re.Pattern[str]:
    """Return the pattern of the tokens that only a template may write; cached by size.

    They are the special tokens, and the other added tokens of the form `<|…|>` (the role tokens of
    DeepSeek-R1 are not marked as special). Other added tokens are text, such as runs of blanks.
    """
    contents = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or re.fullmatch(r"<[|｜].+[|｜]>", token.content))
        and len(token.content.strip()) > 1
        and token.content not in _THINKING_TAGS
    ]
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # (?!): never matches


@dataclass(frozen=True)
class Conversation:
    """A conversation as templates take it, with the control tokens in its texts broken."""

    tokenizer: Any
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    control_texts: int  # control tokens that messages and tools spell out
    trained: list[bool]  # whether each answer is marked to be trained on
    _texts: dict[tuple[int, bool], str | TemplateError] = field(
        default_factory=dict, init=False, compare=False
    )  # by the arguments of `render`

    def render(self, count: int | None = None, prompt: bool = False) -> str:
        """Return the text of the first `count` messages; with `prompt`, an answer is to follow.

        Raises:
            UserError: the template refuses the conversation, or passes a bound.
        """
        key = len(self.messages) if count is None else count, prompt
        if key not in self._texts:
            (answers,) = render_template.render([self._request([key])])
            self._texts[key] = answers[0]
        text = self._texts[key]
        if isinstance(text, TemplateError):
            raise self._refusal(text) from text
        return text

    def _turns(self) -> list[tuple[int, bool]]:
        """Return the arguments of `render` for the texts before and after each answer."""
        keys = [(len(self.messages), False)]
        for index, message in enumerate(self.messages):
            if message["role"] == "assistant":
                keys += [(index, True), (index + 1, False)]
        return list(dict.fromkeys(keys))

    def _request(self, keys: list[tuple[int, bool]]) -> Request:
        # Templates of reasoning models read `enable_thinking`: it is off, as rows have answers
        # only.
        variables = {**self.tokenizer.special_tokens_map, "enable_thinking": False}
        try:
            template = self.tokenizer.get_chat_template(tools=self.tools)
        except ValueError as error:  # it has none, or several without a default
            raise self._refusal(error) from error
        place = origin(template, self.tokenizer.name_or_path)
        return Request(template, self.messages, keys, self.tools, variables, place)

    def _refusal(self, error: Exception) -> UserError:
        return UserError(
            _("The model's chat template refuses a conversation: {reason}"),
            self.roles(),
            _(
                "Some templates take no system message, or need alternating turns; "
                "`data.chat_template` sets another one."
            ),
            reason=str(error).replace(BREAK, ""),
        )

    def prompt(self, count: int) -> str:
        """Return the text of the first `count` messages up to where the next answer begins."""
        text = self.render(count, prompt=True)
        after_tool = count > 0 and self.messages[count - 1]["role"] == "tool"
        if after_tool or "add_generation_prompt" not in str(self.tokenizer.chat_template):
            # Such a template opens the assistant's turn only together with an answer.
            opening = self._opening(count)
            if opening.startswith(text) and opening[len(text) :].strip():
                text = opening
        is_open = text.rstrip().endswith("<think>")  # the template has no `enable_thinking`
        if is_open and not self._opening(count).rstrip().endswith("<think>"):
            text = text.rstrip().removesuffix("<think>") + _CLOSED_THOUGHT
        return text

    def _opening(self, count: int) -> str:
        """Return the text before an answer that follows the first `count` messages."""
        probe = {"role": "assistant", "content": _PROBE}
        probed = replace(self, messages=[*self.messages[:count], probe]).render()
        return probed.partition(_PROBE)[0] if _PROBE in probed else ""

    def answers(self, full: str, whole: bool) -> tuple[str, list[Span | None]]:
        """Return the text and the position of each answer; None where the template rewrites it.

        Args:
            full: the rendered conversation.
            whole: it ends with the last message; else with the prompt for another answer.
        """
        spans: list[Span | None] = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            before = self.prompt(index)
            is_last = whole and index + 1 == len(self.messages)
            after = full if is_last else self.render(index + 1)
            span = self._find(message, before, after) if full.startswith(after) else None
            if is_last and not span and not message.get("tool_calls"):
                # The template opens a turn in another way when an answer is yet to come. Put the
                # answer behind the text that chatting puts before it.
                opening, content = self._opening(index), message["content"].strip()
                rest = after[len(opening) :]
                is_unchanged = after.startswith(opening) and rest.startswith(content)
                if (
                    is_unchanged
                    and before.startswith(opening.rstrip())
                    and _THINKING_TAGS[1] not in content
                ):
                    full = before + rest
                    span = Span(len(before), len(before) + len(content), len(full))
            spans.append(span)
        return full, spans

    def _find(self, message: dict[str, Any], before: str, after: str) -> Span | None:
        """Return where the answer is in `after`, which must begin with its prompt `before`."""
        if not after.startswith(before):
            return None
        start, turn = len(before), after[len(before) :]
        if message.get("tool_calls"):  # the whole turn, up to the control token that ends it
            tokens = _control_tokens(self.tokenizer, len(self.tokenizer)).finditer(turn)
            ends = [token.start() for token in tokens if not turn[token.end() :].strip()]
            return Span(start, start + (ends or [len(turn.rstrip())])[-1], len(after))
        for text in (message["content"], message["content"].strip()):
            # Some templates put a space before the answer; the model has to write that too.
            offset = turn.find(text)
            if offset >= 0 and not turn[:offset].strip():
                return Span(start, start + offset + len(text), len(after))
        return None

    def check_tools(self, full: str) -> None:
        """Raise a UserError if the template renders no tools, tool calls or tool results.

        That is so where the text is the same without tools, or with other calls or results.
        """
        renamed, results = [], []
        for message in self.messages:
            calls = [
                {**call, "function": {**call["function"], "name": "other"}}
                for call in message.get("tool_calls", [])
            ]
            renamed.append({**message, "tool_calls": calls} if calls else message)
            results.append(
                {**message, "content": "other"} if message["role"] == "tool" else message
            )
        variants = {
            _("The model's chat template renders no tools."): replace(self, tools=None),
            _("The model's chat template renders no tool calls."): replace(self, messages=renamed),
            _("The model's chat template renders no tool results."): replace(
                self, messages=results
            ),
        }
        for what, variant in variants.items():
            if variant == self:
                continue
            try:
                is_ignored = variant.render() == full
            except TemplateLimitError:
                raise
            except UserError:  # the template depends on what was changed
                is_ignored = False
            if is_ignored:
                raise UserError(what, self.roles(), CHOOSE_TEMPLATE)

    def check_texts(self, full: str, spans: Sequence[Span | None]) -> None:
        """Raise a UserError if the template leaves out text that the row is about.

        That is a user message, or the text beside a tool call that is trained on. Other answers are
        in their spans; tool results may be quoted, and system messages are counted. Each answer has
        its span in `full`, or None.
        """
        missing = ""
        position = number = 0  # of characters, of answers; texts are in the order of the messages
        for message in self.messages:
            text = message["content"].strip()
            span = spans[number] if number < len(spans) else None
            if message["role"] == "user":
                start = full.find(text, position, span.start if span else len(full))
                if start < 0:
                    missing = _("The model's chat template leaves out a user message.")
                position = start + len(text)
            elif message["role"] == "assistant":
                if span and self.trained[number] and message.get("tool_calls"):
                    turn = full[span.start : span.end]
                    # Templates may move the tags of a thought, and the white space around them.
                    if any(part.strip() not in turn for part in _THINKING_TAG.split(text)):
                        missing = _("The model's chat template leaves out text beside a tool call.")
                position = span.end if span else position
                number += 1
            if missing:
                raise UserError(missing, self.roles(), CHOOSE_TEMPLATE)

    def roles(self) -> Message:
        """Return the roles of the messages, as the place of an error."""
        roles = ", ".join(message["role"] for message in self.messages)
        return Message(_("roles: {roles}"), {"roles": roles})


def render_turns(conversations: Sequence[Conversation]) -> None:
    """Render the texts before and after each answer together, where they are not too long.

    Those that are not rendered here are rendered one by one, when they are needed.

    Raises:
        TemplateLimitError: the template passes a bound.
    """
    keys = [conversation._turns() for conversation in conversations]
    sizes = [
        len(str(each.tools))
        + sum(len(m["content"]) + len(str(m.get("tool_calls", ""))) for m in each.messages)
        for each in conversations
    ]
    if sum(len(each) * size for each, size in zip(keys, sizes, strict=True)) > _BATCH_CHARACTERS:
        return
    try:
        requests = [each._request(key) for each, key in zip(conversations, keys, strict=True)]
    except UserError:  # no template: `Conversation.render` raises that
        return
    answers = render_template.render(requests)
    for each, key, texts in zip(conversations, keys, answers, strict=True):
        each._texts.update(zip(key, texts, strict=True))


def is_trained(message: Mapping[str, Any]) -> bool:
    """Return whether a message is an answer that is trained on."""
    return message["role"] == "assistant" and message.get("train") is not False


def break_control_tokens(tokenizer: Any, text: str) -> tuple[str, int]:
    """Return the text with the control tokens in it broken, and their number."""
    pattern = _control_tokens(tokenizer, len(tokenizer))
    return pattern.subn(lambda token: token[0][0] + BREAK + token[0][1:], text)


def prepare_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: str
) -> Conversation:
    """Return the conversation with the control tokens in its texts broken.

    Args:
        tools: JSON text of the list of tools that the assistant may call; "": none.

    Raises:
        UserError: the tools or calls are not a JSON list of named functions.
    """
    control_texts = 0

    def broken(text: str) -> str:
        nonlocal control_texts
        text, count = break_control_tokens(tokenizer, text)
        control_texts += count
        return text

    def parsed(text: str) -> list[dict[str, Any]]:
        # Written again first: JSON can hide a control token behind escapes.
        listed = json.loads(broken(json.dumps(json.loads(text), ensure_ascii=False)))
        # Templates expect OpenAI's form: `{"type": "function", "function": …}`.
        items = [
            item if "function" in item else {"type": "function", "function": item}
            for item in listed
        ]
        for function in (item["function"] for item in items):
            if not isinstance(function, dict) or not function.get("name"):
                raise ValueError(function)
        return items

    prepared = []
    try:
        for message in messages:
            entry = {"role": message["role"], "content": broken(message["content"])}
            if calls := message.get("tool_calls"):
                entry["tool_calls"] = parsed(calls)
            prepared.append(entry)
        listed = parsed(tools) if tools else None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(_("Tools or tool calls are not a JSON list of named functions.")) from error
    trained = [is_trained(message) for message in messages if message["role"] == "assistant"]
    return Conversation(tokenizer, prepared, listed or None, control_texts, trained)
