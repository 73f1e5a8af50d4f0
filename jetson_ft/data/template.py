"""Messages to token ids with the model's own chat template.

A conversation is rendered piece by piece (context, answer, context, answer, …) and each
piece is tokenised alone, so that training sees exactly the ids that chatting produces:
the prompt ends where the answer begins. `CONTEXT` tokens are read, `ANSWER` tokens are
learnt, `END` tokens (the end of a turn) are learnt but count in no per-answer measure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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

    def add(self, ids: list[int], part: int) -> None:
        """Appends ids that all belong to one part."""
        self.ids += ids
        self.parts += [part] * len(ids)

    def labels(self) -> list[int]:
        """Ids to learn, `IGNORED` elsewhere; not shifted."""
        return [i if part else IGNORED for i, part in zip(self.ids, self.parts, strict=True)]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Encoded:
    """The whole conversation; every assistant turn is learnt where the template allows it.

    Some templates rewrite earlier turns once a later one follows; then only the last
    answer is learnt.

    Raises:
        UserError: the template can't render such a conversation.
    """
    full = _render(tokenizer, messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_answer_span(tokenizer, messages, full, index) for index in turns]
    if any(span is None for span in spans):
        spans = spans[-1:]
    result, position = Encoded(), 0
    for span in spans:
        if span is None:
            raise UserError("The chat template doesn't keep the conversation before an answer.")
        start, answer_end, turn_end = span
        result.add(_ids(tokenizer, full[position:start]), CONTEXT)
        result.add(_ids(tokenizer, full[start:answer_end]), ANSWER)
        closing = _ids(tokenizer, full[answer_end:turn_end])
        # The first token after the answer ends the turn; line breaks behind it are layout.
        result.add(closing[:1], END)
        result.add(closing[1:], CONTEXT)
        position = turn_end
    return result


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Ids of a conversation that waits for the next answer."""
    earlier = encode(tokenizer, _answered(messages)).ids if _answered(messages) else []
    known = _render(tokenizer, _answered(messages)) if earlier else ""
    full = _render(tokenizer, messages, prompt=True)
    if not full.startswith(known):
        return _ids(tokenizer, full)
    return earlier + _ids(tokenizer, full[len(known) :])


def _answered(messages: list[Message]) -> list[Message]:
    """The leading part that ends with the last answer."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: turns[-1] + 1] if turns else []


def _answer_span(
    tokenizer: Any, messages: list[Message], full: str, index: int
) -> tuple[int, int, int] | None:
    """(start of the answer, its end, end of its turn) in the rendered text."""
    before = _render(tokenizer, messages[:index], prompt=True)
    after = _render(tokenizer, messages[: index + 1])
    if not (full.startswith(after) and after.startswith(before)):
        return None
    content = messages[index]["content"]
    for text in (content, content.strip()):
        if after[len(before) :].startswith(text):
            return len(before), len(before) + len(text), len(after)
    return None


def _render(tokenizer: Any, messages: list[Message], prompt: bool = False) -> str:
    # transformers renders in a sandboxed, immutable Jinja environment.
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # whatever a template raises is about this conversation
        raise UserError(
            f"The model's chat template refuses a conversation: {error}",
            "roles: " + ", ".join(message["role"] for message in messages),
            "Some templates take no system message, or need alternating turns.",
        ) from error
    return str(text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


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
