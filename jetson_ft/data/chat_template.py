"""Convert messages to token ids with the model's own chat template.

The rendered conversation is split into segments (context, answer, context, answer, …) and each
segment is tokenized alone, so that training sees exactly the ids that chatting produces: the prompt
ends where the answer begins. `ANSWER` and `END` tokens are trained on, `CONTEXT` tokens are not;
`END` tokens (the end of a turn) count in no per-answer metric.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jetson_ft.data.formats import ChatMessage
from jetson_ft.errors import Message, UserError, _

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

    def add(self, ids: list[int], role: int) -> None:
        """Append tokens that have the same role."""
        self.ids += ids
        self.segments += [role] * len(ids)


class _Span(NamedTuple):  # of an answer in the rendered text, in characters
    start: int
    end: int
    turn_end: int


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[ChatMessage]) -> Encoded:
    """Encode the whole conversation, with every answer to be trained on.

    Some templates rewrite earlier turns once a later one follows; then only the last answer is
    trained on.

    Raises:
        UserError: the template can't render such a conversation, or changes the last answer.
    """
    full, spans = _answer_spans(tokenizer, messages)
    trained = [span for span in (spans[-1:] if None in spans else spans) if span]
    if spans and not trained:
        raise UserError(
            _("The model's chat template doesn't put the last answer unchanged after the prompt."),
            _roles(messages),
            _("Choose a model whose template writes answers unchanged."),
        )
    return _encode_turns(tokenizer, full, trained)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[ChatMessage]) -> list[int]:
    """Return the ids of a conversation up to where the next answer begins."""
    full, spans = _answer_spans(tokenizer, messages, prompt=True)
    earlier = [span for span in spans if span] if None not in spans else []
    position = earlier[-1].turn_end if earlier else 0
    return _encode_turns(tokenizer, full, earlier).ids + _ids(tokenizer, full[position:])


def _encode_turns(tokenizer: Any, full: str, spans: list[_Span]) -> Encoded:
    """Encode the text up to the end of the last span's turn."""
    special = _special_ids(tokenizer, len(tokenizer))
    result, position = Encoded(), 0
    for start, end, turn_end in spans:
        result.add(_ids(tokenizer, full[position:start]), CONTEXT)
        result.add(_ids(tokenizer, full[start:end]), ANSWER)
        closing = _ids(tokenizer, full[end:turn_end])
        # The first special token after the answer ends the turn (some templates put a space
        # before it); if the template writes none, the end token is added. The rest is context.
        end_at = next((i for i, token in enumerate(closing) if token in special), None)
        if end_at is None:
            end_at, closing = 0, [tokenizer.eos_token_id, *closing]
        result.add(closing[:end_at], ANSWER)
        result.add(closing[end_at : end_at + 1], END)
        result.add(closing[end_at + 1 :], CONTEXT)
        result.characters += end - start
        position = turn_end
    return result


@lru_cache(maxsize=1)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Return the tokens that stand for no text; cached until the tokenizer's size changes."""
    # Among the added tokens of GPT-2 style tokenizers are runs of blanks, which end nothing.
    added = tokenizer.added_tokens_decoder
    return frozenset(number for number, token in added.items() if token.content.strip())


def _answer_spans(
    tokenizer: Any, messages: list[ChatMessage], prompt: bool = False
) -> tuple[str, list[_Span | None]]:
    """Return the text and the position of each answer; None where the template rewrites it."""
    full = _render(tokenizer, messages, prompt)
    spans: list[_Span | None] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], prompt=True)
        is_whole = index + 1 == len(messages) and not prompt
        after = full if is_whole else _render(tokenizer, messages[: index + 1])
        span = None
        if full.startswith(after) and after.startswith(before):
            turn = after[len(before) :]
            for text in (message["content"], message["content"].strip()):
                # Some templates put a space before the answer; the model has to write that too.
                start = turn.find(text)
                if start >= 0 and not turn[:start].strip():
                    span = _Span(len(before), len(before) + start + len(text), len(after))
                    break
        spans.append(span)
    return full, spans


def _render(tokenizer: Any, messages: list[ChatMessage], prompt: bool = False) -> str:
    # transformers renders in a sandboxed, immutable Jinja environment. Templates of reasoning
    # models read `enable_thinking`: it is off, as rows have answers only.
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )
    except Exception as error:  # whatever a template raises is about this conversation
        raise UserError(
            _("The model's chat template refuses a conversation: {reason}"),
            _roles(messages),
            _("Some templates take no system message, or need alternating turns."),
            reason=str(error),
        ) from error
    return str(text)


def _roles(messages: list[ChatMessage]) -> Message:
    roles = ", ".join(message["role"] for message in messages)
    return Message(_("roles: {roles}"), {"roles": roles})


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: rows that are too long are reported by `tokenize_rows`.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Return the tokens that end a reply: the tokenizer's, the template's and the model's own."""
    probe = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
    encoded = encode(tokenizer, probe)
    ends = {i for i, role in zip(encoded.ids, encoded.segments, strict=True) if role == END}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return sorted({*ends, int(tokenizer.eos_token_id)})
