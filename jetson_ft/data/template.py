"""Messages to token ids with the model's own chat template.

A conversation is rendered piece by piece (context, answer, context, answer, …) and each
piece is tokenised alone, so that training sees exactly the ids that chatting produces:
the prompt ends where the answer begins. `CONTEXT` tokens are read, `ANSWER` tokens are
learnt, `END` tokens (the end of a turn) are learnt but count in no per-answer measure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jetson_ft.data.formats import Message
from jetson_ft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT, ANSWER, END = 0, 1, 2
IGNORED = -100  # label of a token that is not learnt; cross_entropy's ignore_index


@dataclass
class Encoded:
    """Token ids with the part (`CONTEXT`, `ANSWER`, `END`) of each."""

    ids: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    characters: int = 0  # of the answers that are learnt

    def add(self, ids: list[int], part: int) -> None:
        """Appends ids that all belong to one part."""
        self.ids += ids
        self.parts += [part] * len(ids)

    def labels(self) -> list[int]:
        """Ids to learn, `IGNORED` elsewhere; not shifted."""
        return [i if part else IGNORED for i, part in zip(self.ids, self.parts, strict=True)]


class _Span(NamedTuple):
    """Where an answer stands in the rendered text."""

    start: int
    end: int
    turn_end: int


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Encoded:
    """The whole conversation; every assistant turn is learnt where the template allows it.

    Some templates rewrite earlier turns once a later one follows; then only the last
    answer is learnt.

    Raises:
        UserError: the template can't render such a conversation.
    """
    full = _render(tokenizer, messages)
    spans = _answer_spans(tokenizer, messages, full)
    learnt = [span for span in (spans[-1:] if None in spans else spans) if span]
    if spans and not learnt:
        raise UserError(
            "The model's chat template doesn't put the last answer behind the prompt as it is.",
            "roles: " + ", ".join(message["role"] for message in messages),
            "Choose a model whose template writes answers unchanged.",
        )
    return _encode_turns(tokenizer, full, learnt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Ids of a conversation that waits for the next answer."""
    full = _render(tokenizer, messages, prompt=True)
    spans = _answer_spans(tokenizer, messages, full)
    earlier = [span for span in spans if span] if None not in spans else []
    position = earlier[-1].turn_end if earlier else 0
    return _encode_turns(tokenizer, full, earlier).ids + _ids(tokenizer, full[position:])


def _encode_turns(tokenizer: Any, full: str, spans: list[_Span]) -> Encoded:
    """The text up to the end of the last span's turn."""
    special = _special_ids(tokenizer, len(tokenizer))
    result, position = Encoded(), 0
    for start, end, turn_end in spans:
        result.add(_ids(tokenizer, full[position:start]), CONTEXT)
        result.add(_ids(tokenizer, full[start:end]), ANSWER)
        closing = _ids(tokenizer, full[end:turn_end])
        # The first special token behind the answer ends the turn (some templates put a space
        # before it); where the template writes none, the end token does. The rest is layout.
        at = next((at for at, token in enumerate(closing) if token in special), None)
        if at is None:
            at, closing = 0, [tokenizer.eos_token_id, *closing]
        result.add(closing[:at], ANSWER)
        result.add(closing[at : at + 1], END)
        result.add(closing[at + 1 :], CONTEXT)
        result.characters += end - start
        position = turn_end
    return result


@lru_cache(maxsize=1)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Tokens that stand for no text. Some tokenizers have thousands: listed once, not a row."""
    # Among the added tokens of GPT-2 style tokenizers are runs of blanks, which end nothing.
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.content.strip())


def _answer_spans(tokenizer: Any, messages: list[Message], full: str) -> list[_Span | None]:
    """The place of each answer in the rendered text; None where the template rewrites it."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [_answer_span(tokenizer, messages, full, index) for index in turns]


def _answer_span(tokenizer: Any, messages: list[Message], full: str, index: int) -> _Span | None:
    before = _render(tokenizer, messages[:index], prompt=True)
    after = _render(tokenizer, messages[: index + 1])
    if not (full.startswith(after) and after.startswith(before)):
        return None
    content, written = messages[index]["content"], after[len(before) :]
    for text in (content, content.strip()):
        # Some templates put a space before the answer; the model has to write that too.
        place = written.find(text)
        if place >= 0 and not written[:place].strip():
            return _Span(len(before), len(before) + place + len(text), len(after))
    return None


def _render(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str:
    # transformers renders in a sandboxed, immutable Jinja environment. Templates of reasoning
    # models know `enable_thinking`: rows have answers only, so they are answered at once.
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )
    except Exception as error:  # whatever a template raises is about this conversation
        raise UserError(
            f"The model's chat template refuses a conversation: {error}",
            "roles: " + ", ".join(message["role"] for message in messages),
            "Some templates take no system message, or need alternating turns.",
        ) from error
    return str(text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: over-long rows are reported by `data.tokens`.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Tokens that end a reply: the tokenizer's, the template's and the model's own."""
    probe = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    encoded = encode(tokenizer, probe)
    ends = {i for i, part in zip(encoded.ids, encoded.parts, strict=True) if part == END}
    ends.add(int(tokenizer.eos_token_id))
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return sorted(ends)
