"""Convert messages to token ids with the model's own chat template.

The rendered conversation is split into segments (context, answer, context, answer, …) and each
segment is tokenized alone, so that training sees exactly the ids that chatting produces: the prompt
ends where the answer begins. `ANSWER` and `END` tokens are trained on, `CONTEXT` tokens are not;
`END` tokens (the end of a turn) count in no per-answer metric.

Only the template writes control tokens. Where the text of a message spells one out, such as
`<|im_end|>`, it is encoded as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jetson_ft.data.formats import TEXT, ChatMessage
from jetson_ft.data.long_texts import token_ids
from jetson_ft.data.templates import CHOOSE_TEMPLATE, with_fixed_date
from jetson_ft.errors import Message, UserError, _

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT, ANSWER, END = 0, 1, 2  # token roles; `segments` has one for each token
IGNORE_INDEX = -100  # label of a token that is not trained on; cross_entropy's ignore_index

# Halves of surrogate pairs, which no text contains. `_BREAK` is put behind the first character of
# each control token in a message's text; `_PROBE` is the content of an answer that isn't there.
_BREAK, _PROBE = "\udc00", "\udc01"
_THINKING_TAGS = ("<think>", "</think>")  # answers contain them, whatever the tokenizer says
_THINKING_TAG = re.compile("|".join(map(re.escape, _THINKING_TAGS)))
_CLOSED_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass
class Encoded:
    """Token ids with the role (`CONTEXT`, `ANSWER`, `END`) of each."""

    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    characters: int = 0  # of the answers that are trained on
    context_answers: int = 0  # not trained on, because the template rewrites them
    system_dropped: bool = False  # the template doesn't render the system message
    control_texts: int = 0  # control tokens that the messages spell out

    def add(self, ids: list[int], role: int) -> None:
        """Append tokens that have the same role."""
        self.ids += ids
        self.segments += [role] * len(ids)


class _Span(NamedTuple):  # of an answer in the rendered text, in characters
    start: int
    end: int
    turn_end: int


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], tools: str = ""
) -> Encoded:
    """Encode the conversation up to its last answer that is trained on.

    Some templates rewrite earlier turns once a later one follows; then only the last answer is
    trained on. A document of plain text is encoded without a template, and every token of it is
    trained on.

    Args:
        tools: JSON text of the list of tools that the assistant may call; "": none.

    Raises:
        UserError: the template can't render such a conversation, changes the last answer, or leaves
            out a user message or the text beside a tool call that is trained on.
    """
    if messages[0]["role"] == TEXT:
        return _encode_document(tokenizer, messages[0]["content"])
    messages = until_last_trained(messages)
    chat = _conversation(tokenizer, messages, tools)
    full = chat.render()
    chat.check_tools(full)
    full, spans = chat.answers(full, whole=True)
    if spans and not spans[-1]:
        raise UserError(
            _("The model's chat template doesn't put the last answer unchanged after the prompt."),
            chat.roles(),
            CHOOSE_TEMPLATE,
        )
    trained = [_is_trained(message) for message in messages if message["role"] == "assistant"]
    if None in spans:
        spans = [*[None] * (len(spans) - 1), spans[-1]]
    chat.check_texts(full, spans, trained)
    kept = [span for span in spans if span]
    result = _encode_turns(tokenizer, full, kept, trained[-len(kept) :])
    result.context_answers = sum(trained[: len(trained) - len(kept)])
    result.system_dropped = any(
        message["role"] == "system" and message["content"].strip() not in full
        for message in chat.messages
    )
    result.control_texts = json.dumps([chat.messages, chat.tools], ensure_ascii=False).count(_BREAK)
    return result


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], tools: str = ""
) -> list[int]:
    """Return the ids of a conversation up to where the next answer begins."""
    chat = _conversation(tokenizer, messages, tools)
    full, spans = chat.answers(chat.prompt(len(messages)), whole=False)
    earlier = [span for span in spans if span] if None not in spans else []
    position = earlier[-1].turn_end if earlier else 0
    turns = _encode_turns(tokenizer, full, earlier, [True] * len(earlier))
    return turns.ids + _ids(tokenizer, full[position:])


def _encode_document(tokenizer: Any, text: str) -> Encoded:
    """Encode plain text: the start token if the tokenizer has one, the text, the end token."""
    result = Encoded(characters=len(text))
    broken, result.control_texts = _broken(tokenizer, text)
    start = list(tokenizer("", verbose=False)["input_ids"])
    result.add([token for token in start if token != tokenizer.eos_token_id], CONTEXT)
    result.add(_ids(tokenizer, broken), ANSWER)
    result.add([tokenizer.eos_token_id], END)
    return result


def prompt_and_reference(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    tools: str = "",
    max_tokens: int = 256,
) -> tuple[list[int], str]:
    """Return the ids before the last answer that is trained on, and that answer's text.

    Of a document these are the first half, and the text after it; at most `max_tokens` of each.
    """
    if messages[0]["role"] == TEXT:
        ids = encode(tokenizer, messages).ids[:-1]
        half = min((len(ids) + 1) // 2, max_tokens)
        following = tokenizer.decode(ids[half : half + max_tokens])
        return ids[:half], str(following)
    *before, answer = until_last_trained(messages)
    prompt = encode_prompt(tokenizer, before, tools)
    if not answer.get("tool_calls"):
        return prompt, answer["content"]
    whole = encode(tokenizer, messages, tools)
    tokens = list(zip(whole.ids, whole.segments, strict=True))[len(prompt) :]
    call = tokenizer.decode([number for number, role in tokens if role == ANSWER])
    return prompt, str(call)


def until_last_trained(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages up to the last answer that is trained on; all if there is none."""
    trained = [index for index, message in enumerate(messages) if _is_trained(message)]
    return list(messages[: trained[-1] + 1] if trained else messages)


def _is_result(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "tool")


def _is_trained(message: ChatMessage) -> bool:
    return message["role"] == "assistant" and message.get("train") is not False


def _encode_turns(
    tokenizer: Any, full: str, spans: list[_Span], trained: Sequence[bool]
) -> Encoded:
    """Encode the text up to the end of the last span's turn."""
    special = _special_ids(tokenizer, len(tokenizer))
    result, position = Encoded(), 0
    for (start, end, turn_end), is_trained in zip(spans, trained, strict=True):
        answer, end_of_turn = (ANSWER, END) if is_trained else (CONTEXT, CONTEXT)
        result.add(_ids(tokenizer, full[position:start]), CONTEXT)
        result.add(_ids(tokenizer, full[start:end]), answer)
        closing = _ids(tokenizer, full[end:turn_end])
        # The first special token after the answer ends the turn (some templates put a space
        # before it); if the template writes none, the end token is added. The rest is context.
        end_at = next((i for i, token in enumerate(closing) if token in special), None)
        if end_at is None:
            end_at, closing = 0, [tokenizer.eos_token_id, *closing]
        result.add(closing[:end_at], answer)
        result.add(closing[end_at : end_at + 1], end_of_turn)
        result.add(closing[end_at + 1 :], CONTEXT)
        if is_trained:
            result.characters += len(full[start:end].replace(_BREAK, ""))
        position = turn_end
    return result


@lru_cache(maxsize=1)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Return the tokens that stand for no text; cached until the tokenizer's size changes."""
    # Among the added tokens of GPT-2 style tokenizers are runs of blanks, which end nothing.
    added = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in added.items() if token.content.strip())


@lru_cache(maxsize=1)
def _control_tokens(tokenizer: Any, size: int) -> re.Pattern[str]:
    """Return the pattern of the tokens that only a template may write; cached as above.

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
class _Conversation:
    """A conversation as templates take it, with the control tokens in its texts broken."""

    tokenizer: Any
    messages: list[dict[str, Any]]
    tools: list[Any] | None

    def render(self, count: int | None = None, prompt: bool = False) -> str:
        """Return the text of the first `count` messages; with `prompt`, an answer is to follow."""
        # transformers renders in a sandboxed, immutable Jinja environment. Templates of reasoning
        # models read `enable_thinking`: it is off, as rows have answers only.
        try:
            template = self.tokenizer.get_chat_template(tools=self.tools)
            text = self.tokenizer.apply_chat_template(
                self.messages[:count],
                tools=self.tools,
                chat_template=with_fixed_date(template),
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=False,
            )
        except Exception as error:  # whatever a template raises is about this conversation
            raise UserError(
                _("The model's chat template refuses a conversation: {reason}"),
                self.roles(),
                _(
                    "Some templates take no system message, or need alternating turns; "
                    "`data.chat_template` sets another one."
                ),
                reason=str(error).replace(_BREAK, ""),
            ) from error
        return str(text)

    def prompt(self, count: int) -> str:
        """Return the text of the first `count` messages up to where the next answer begins."""
        text = self.render(count, prompt=True)
        after_tool = count > 0 and _is_result(self.messages[count - 1])
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

    def answers(self, full: str, whole: bool) -> tuple[str, list[_Span | None]]:
        """Return the text and the position of each answer; None where the template rewrites it.

        Args:
            full: the rendered conversation.
            whole: it ends with the last message; else with the prompt for another answer.
        """
        spans: list[_Span | None] = []
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
                    span = _Span(len(before), len(before) + len(content), len(full))
            spans.append(span)
        return full, spans

    def _find(self, message: dict[str, Any], before: str, after: str) -> _Span | None:
        """Return where the answer is in `after`, which must begin with its prompt `before`."""
        if not after.startswith(before):
            return None
        start, turn = len(before), after[len(before) :]
        if message.get("tool_calls"):  # the whole turn, up to the control token that ends it
            tokens = _control_tokens(self.tokenizer, len(self.tokenizer)).finditer(turn)
            ends = [token.start() for token in tokens if not turn[token.end() :].strip()]
            return _Span(start, start + (ends or [len(turn.rstrip())])[-1], len(after))
        for text in (message["content"], message["content"].strip()):
            # Some templates put a space before the answer; the model has to write that too.
            offset = turn.find(text)
            if offset >= 0 and not turn[:offset].strip():
                return _Span(start, start + offset + len(text), len(after))
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
            results.append({**message, "content": "other"} if _is_result(message) else message)
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
            except UserError:  # the template depends on what was changed
                is_ignored = False
            if is_ignored:
                raise UserError(what, self.roles(), CHOOSE_TEMPLATE)

    def check_texts(
        self, full: str, spans: Sequence[_Span | None], trained: Sequence[bool]
    ) -> None:
        """Raise a UserError if the template leaves out text that the row is about.

        That is a user message, or the text beside a tool call that is trained on. Other answers are
        in their spans; tool results may be quoted, and system messages are counted. Each answer has
        its span in `full`, or None, and whether it is marked to be trained on.
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
                if span and trained[number] and message.get("tool_calls"):
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


def _broken(tokenizer: Any, text: str) -> tuple[str, int]:
    """Return the text with the control tokens in it broken, and their number."""
    pattern = _control_tokens(tokenizer, len(tokenizer))
    return pattern.subn(lambda token: token[0][0] + _BREAK + token[0][1:], text)


def _conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: str
) -> _Conversation:
    def broken(text: str) -> str:
        return _broken(tokenizer, text)[0]

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
    return _Conversation(tokenizer, prepared, listed or None)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of rendered text; broken control tokens become ordinary text."""

    first, *others = text.split(_BREAK)
    ids = token_ids(tokenizer, first)
    for part in others:
        # Behind a line break, as some tokenizers put a blank before the first word of a text.
        line_break, both = token_ids(tokenizer, "\n"), token_ids(tokenizer, f"\n{part}")
        is_apart = both[: len(line_break)] == line_break
        ids += both[len(line_break) :] if is_apart else token_ids(tokenizer, part)
    return ids


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Return the tokens that end a reply: the tokenizer's, the template's and the model's own."""
    probe = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
    encoded = encode(tokenizer, probe)
    ends = {i for i, role in zip(encoded.ids, encoded.segments, strict=True) if role == END}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return sorted({*ends, int(tokenizer.eos_token_id)})
