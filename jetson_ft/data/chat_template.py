"""Convert messages to token ids with the model's own chat template.

The rendered conversation is split into segments (context, answer, context, answer, …) and each
segment is tokenized alone, so that training sees exactly the ids that chatting produces: the prompt
ends where the answer begins. `ANSWER` and `END` tokens are trained on, `CONTEXT` tokens are not;
`END` tokens (the end of a turn) count in no per-answer metric.

Only the template writes control tokens. Where the text of a message spells one out, such as
`<|im_end|>`, it is encoded as ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jetson_ft.data.conversation import (
    BREAK,
    Conversation,
    Span,
    break_control_tokens,
    is_trained,
    prepare_conversation,
    render_turns,
)
from jetson_ft.data.formats import TEXT, ChatMessage
from jetson_ft.data.long_texts import token_ids_of_parts
from jetson_ft.data.render_template import TemplateLimitError
from jetson_ft.data.templates import CHOOSE_TEMPLATE
from jetson_ft.errors import UserError, _

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT, ANSWER, END = 0, 1, 2  # token roles; `segments` has one for each token
IGNORE_INDEX = -100  # label of a token that is not trained on; cross_entropy's ignore_index


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
    (result,) = encode_all(tokenizer, [(messages, tools)])
    if isinstance(result, UserError):
        raise result
    return result


def encode_all(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[Sequence[ChatMessage], str]]
) -> list[Encoded | UserError]:
    """Encode rows (messages and tools) as `encode`; their texts are rendered together.

    Returns:
        The encoded row, or why it is refused, for each.

    Raises:
        TemplateLimitError: the template passes a bound; other rows would take as long.
    """
    prepared: list[Conversation | UserError | None] = []  # None: a document
    for messages, tools in rows:
        chat: Conversation | UserError | None = None
        if messages[0]["role"] != TEXT:
            try:
                chat = prepare_conversation(tokenizer, until_last_trained(messages), tools)
            except UserError as error:
                chat = error
        prepared.append(chat)
    render_turns([chat for chat in prepared if isinstance(chat, Conversation)])
    results: list[Encoded | UserError] = []
    for (messages, _tools), chat in zip(rows, prepared, strict=True):
        if chat is None:
            results.append(_encode_document(tokenizer, messages[0]["content"]))
        elif isinstance(chat, UserError):
            results.append(chat)
        else:
            try:
                results.append(_encode_conversation(chat))
            except TemplateLimitError:
                raise
            except UserError as error:
                results.append(error)
    return results


def _encode_conversation(chat: Conversation) -> Encoded:
    """Encode a conversation that ends with its last answer that is trained on."""
    full = chat.render()
    chat.check_tools(full)
    full, spans = chat.answers(full, whole=True)
    if spans and not spans[-1]:
        raise UserError(
            _("The model's chat template doesn't put the last answer unchanged after the prompt."),
            chat.roles(),
            CHOOSE_TEMPLATE,
        )
    if None in spans:
        spans = [*[None] * (len(spans) - 1), spans[-1]]
    chat.check_texts(full, spans)
    kept = [span for span in spans if span]
    result = _encode_turns(chat.tokenizer, full, kept, chat.trained[-len(kept) :])
    result.context_answers = sum(chat.trained[: len(chat.trained) - len(kept)])
    result.system_dropped = any(
        message["role"] == "system" and message["content"].strip() not in full
        for message in chat.messages
    )
    result.control_texts = chat.control_texts
    return result


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], tools: str = ""
) -> list[int]:
    """Return the ids of a conversation up to where the next answer begins."""
    chat = prepare_conversation(tokenizer, messages, tools)
    full, spans = chat.answers(chat.prompt(len(messages)), whole=False)
    earlier = [span for span in spans if span] if None not in spans else []
    position = earlier[-1].turn_end if earlier else 0
    turns = _encode_turns(tokenizer, full, earlier, [True] * len(earlier))
    return turns.ids + _ids(tokenizer, full[position:])


def _encode_document(tokenizer: Any, text: str) -> Encoded:
    """Encode plain text: the start token if the tokenizer has one, the text, the end token."""
    result = Encoded(characters=len(text))
    broken, result.control_texts = break_control_tokens(tokenizer, text)
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
    prompt: list[int] | None = None,
) -> tuple[list[int], str]:
    """Return the ids before the last answer that is trained on, and that answer's text.

    Of a document these are the first half, and the text after it; at most `max_tokens` of each.
    `prompt`: the ids before that answer, where they are encoded already.
    """
    if messages[0]["role"] == TEXT:
        ids = encode(tokenizer, messages).ids[:-1]
        half = min((len(ids) + 1) // 2, max_tokens)
        return ids[:half], str(tokenizer.decode(ids[half : half + max_tokens]))
    *before, answer = until_last_trained(messages)
    prompt = prompt or encode_prompt(tokenizer, before, tools)
    if not answer.get("tool_calls"):
        return prompt, answer["content"]
    whole = encode(tokenizer, messages, tools)
    tokens = list(zip(whole.ids, whole.segments, strict=True))[len(prompt) :]
    return prompt, str(tokenizer.decode([number for number, role in tokens if role == ANSWER]))


def until_last_trained(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages up to the last answer that is trained on; all if there is none."""
    trained = [index for index, message in enumerate(messages) if is_trained(message)]
    return list(messages[: trained[-1] + 1] if trained else messages)


def _encode_turns(tokenizer: Any, full: str, spans: list[Span], trained: Sequence[bool]) -> Encoded:
    """Encode the text up to the end of the last span's turn."""
    special = _special_ids(tokenizer, len(tokenizer))
    result, position = Encoded(), 0
    for (start, end, turn_end), train in zip(spans, trained, strict=True):
        answer, end_of_turn = (ANSWER, END) if train else (CONTEXT, CONTEXT)
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
        if train:
            result.characters += len(full[start:end].replace(BREAK, ""))
        position = turn_end
    return result


@lru_cache(maxsize=1)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Return the tokens that stand for no text; cached until the tokenizer's size changes."""
    # Among the added tokens of GPT-2 style tokenizers are runs of blanks, which end nothing.
    added = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in added.items() if token.content.strip())


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of rendered text; broken control tokens become ordinary text."""
    return token_ids_of_parts(tokenizer, text.split(BREAK))


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Return the tokens that end a reply: the tokenizer's, the template's and the model's own."""
    probe = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
    encoded = encode(tokenizer, probe)
    ends = {i for i, role in zip(encoded.ids, encoded.segments, strict=True) if role == END}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return sorted({*ends, int(tokenizer.eos_token_id)})
