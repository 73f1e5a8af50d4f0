"""Replies to prompts of token ids: many at once and greedy, or one as a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from threading import Thread
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _

if TYPE_CHECKING:
    import torch

MAX_REPLY_BATCH = 36  # prompts of a batch, where memory sets no lower limit


_SHOWN_VALUE = 40  # characters of what is no number


def _option(default: Any, text: str, lowest: float, highest: float, **slider: float) -> Any:
    """Return a field of `Sampling`; a slider has the useful part of the allowed range."""
    metadata = {"help": text, "lowest": lowest, "highest": highest, **slider}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Sampling:
    """How a chat generates its replies: the only declaration of defaults and ranges.

    A field's metadata has `help`, `lowest`, `highest` and, but for the seed, a slider's `min`,
    `max`, `step`.

    Raises:
        UserError: a value is out of its range, or no number (a whole one, where the default is).
    """

    max_new_tokens: int = _option(
        256, "Longest reply in tokens.", 1, 32768, min=1, max=1024, step=1
    )
    temperature: float = _option(0.0, "0 is greedy.", 0, 10, min=0.0, max=2.0, step=0.05)
    top_k: int = _option(
        50, "With a temperature: likeliest tokens kept (0: all).", 0, 10**6, min=0, max=200, step=1
    )
    top_p: float = _option(
        1.0, "With a temperature: probability kept.", 1e-6, 1, min=0.05, max=1.0, step=0.05
    )
    repetition_penalty: float = _option(
        1.1, "Above 1 discourages repeats.", 0.01, 10, min=1.0, max=2.0, step=0.05
    )
    seed: int | None = _option(None, "With a temperature: repeatable replies.", 0, 2**63 - 1)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            low, high = option.metadata["lowest"], option.metadata["highest"]
            if value is None and option.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(
                    _("{name} must be a number, not {value}."),
                    name=option.name, value=repr(value)[:_SHOWN_VALUE],
                )  # fmt: skip
            if not low <= value <= high:  # nor is NaN
                raise UserError(
                    _("{name} can't be {value}."), fix=_("From {low:g} to {high:g}."),
                    name=option.name, value=_short(value), low=low, high=high,
                )  # fmt: skip
            if not isinstance(option.default, float):  # a slider may send 256.0
                if value != int(value):
                    raise UserError(
                        _("{name} must be a whole number, not {value}."),
                        name=option.name, value=value,
                    )  # fmt: skip
                object.__setattr__(self, option.name, int(value))


def _short(value: float) -> str:
    """Return a number in a few characters, however many digits it has."""
    try:
        return f"{value:g}"
    except OverflowError:
        return ">1e308" if value > 0 else "<-1e308"


@dataclass(frozen=True)
class Reply:
    """A finished reply."""

    text: str
    ended: bool  # by an end token, not by the length limit
    tokens: int = 0  # generated, without the end token
    ids: tuple[int, ...] = field(default=(), compare=False)  # generated, with the end token


def generate_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    batch_size: Callable[[int], int] = lambda width: MAX_REPLY_BATCH,
) -> list[Reply]:
    """Return the greedy reply to each prompt (token ids), in the order of the prompts.

    Prompts of similar length share a batch, because padding costs as much as other tokens. No
    repetition penalty applies: an evaluation measures the model itself. A reply ends where the
    model's position table does.

    Args:
        progress: called first, and after each batch, with the replies done and their number.
        batch_size: returns the most prompts of a batch whose longest one has that many tokens.

    Raises:
        UserError: a prompt leaves no position for a reply.
    """
    from jetson_ft.models.positions import position_table_size

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    widths = [len(prompts[index]) for index in order]
    table_size = position_table_size(model)
    if table_size and widths and widths[-1] >= table_size:
        raise UserError(
            _("A prompt has {tokens:,} tokens, and the model reads {limit:,} at most."),
            fix=_("Lower `data.max_length`, or leave out the longest rows."),
            tokens=widths[-1], limit=table_size,
        )  # fmt: skip
    spaces = [min(max_new_tokens, (table_size or math.inf) - width) for width in widths]
    # A reply with less space than the others is generated alone, so that theirs stay whole.
    sizes = [
        batch_size(width) if space == max_new_tokens else 1
        for width, space in zip(widths, spaces, strict=True)
    ]
    replies: dict[int, Reply] = {}
    progress(0, len(prompts))
    for start, end in plan_batches(widths, sizes, STEP_COST * max_new_tokens):
        batch = [prompts[index] for index in order[start:end]]
        greedy = Sampling(int(spaces[end - 1]), temperature=0.0, repetition_penalty=1.0)
        output = _generate(model, tokenizer, batch, eos_ids, greedy)
        for index, ids in zip(order[start:end], output.tolist(), strict=True):
            replies[index] = _decode_reply(tokenizer, ids[widths[end - 1] :], eos_ids)
        progress(len(replies), len(prompts))
    return [replies[index] for index in range(len(prompts))]


# The cost of one decoding step of a batch, which reads all weights, in prompt tokens. It is the
# ratio of arithmetic to memory bandwidth, which is about the same on CPUs and GPUs.
STEP_COST = 32


def plan_batches(
    widths: Sequence[int], sizes: Sequence[int], overhead: float
) -> list[tuple[int, int]]:
    """Return the (start, end) of the batches whose total cost is the lowest.

    The cost of a batch is its rows times its widest row, plus `overhead`. The method is dynamic
    programming over the start of the last batch.

    Args:
        widths: tokens of each prompt, ascending.
        sizes: most rows of a batch that ends with that prompt.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # by number of rows: (cost, last batch's start)
    for end in range(1, len(widths) + 1):
        starts = range(max(0, end - sizes[end - 1]), end)
        best.append(min((best[s][0] + (end - s) * widths[end - 1] + overhead, s) for s in starts))
    batches, end = [], len(widths)
    while end:
        batches.append((best[end][1], end))
        end = best[end][1]
    return batches[::-1]


def sampling_steps(sampling: Sampling) -> list[tuple[str, Any]]:
    """Return what changes the logits before a token is chosen, in this order.

    Each step has the name of its setting, and is a function of token ids [rows, tokens] and logits
    [rows, vocabulary] that returns logits; those of tokens that it cuts are -inf. Of the last
    step's logits a greedy reply takes the largest; other replies draw from their softmax. Settings
    without effect have no step.
    """
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps: list[tuple[str, Any]] = []
    if sampling.repetition_penalty != 1:
        penalty = float(sampling.repetition_penalty)
        steps.append(("repetition_penalty", RepetitionPenaltyLogitsProcessor(penalty)))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            steps.append(("temperature", TemperatureLogitsWarper(float(sampling.temperature))))
        if sampling.top_k:
            steps.append(("top_k", TopKLogitsWarper(sampling.top_k)))
        if sampling.top_p < 1:
            steps.append(("top_p", TopPLogitsWarper(sampling.top_p)))
    return steps


def check_embeddings(model: Any, tokenizer: Any, last: int) -> None:
    """Raise `UserError` if the model has no embedding for `last`, the largest id of a text."""
    if last >= len(model.get_input_embeddings().weight):
        raise UserError(
            _("The text has a token that the model has no embedding for: {token}."),
            fix=_("Write it in another way."),
            token=tokenizer.convert_ids_to_tokens(last),
        )


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    eos_ids: Sequence[int],
    sampling: Sampling,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the prompts, padded on the left, with their replies: token ids [rows, tokens]."""
    import torch

    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    check_embeddings(model, tokenizer, int(ids.max()))
    device = model.get_input_embeddings().weight.device
    if sampling.temperature > 0:  # all that changes the distribution is in `sampling_steps`
        kwargs |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        output: torch.Tensor = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            eos_token_id=list(eos_ids),
            pad_token_id=pad,
            use_cache=True,
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=1.0,
            logits_processor=[step for _name, step in sampling_steps(sampling)],
            do_sample=sampling.temperature > 0,
            **kwargs,
        )
    return output


def _decode_reply(tokenizer: Any, ids: list[int], eos_ids: Sequence[int]) -> Reply:
    """Return the reply up to the first end token, without a last character cut in half."""
    length = next((place for place, token in enumerate(ids) if token in eos_ids), len(ids))
    text = str(tokenizer.decode(ids[:length], skip_special_tokens=True)).rstrip("\ufffd").strip()
    return Reply(text, ended=length < len(ids), tokens=length, ids=tuple(ids[: length + 1]))


def stream_reply(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    eos_ids: Sequence[int],
    sampling: Sampling,
    should_stop: Callable[[], bool] = lambda: False,
    prefill_ids: Sequence[int] = (),
) -> Generator[str, None, Reply]:
    """Yield one reply's text in deltas, as it is generated; return the whole reply at the end.

    A reply that begins with `prefill_ids` is continued; what is yielded and returned is the
    rest. Generation runs in a thread, which ends when the iterator is closed, or after a token for
    which `should_stop` returns True.
    """
    import torch
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    closed = False

    def is_done(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stop = closed or should_stop()
        return torch.full((len(input_ids),), stop, dtype=torch.bool, device=input_ids.device)

    prompt = [*prompt, *prefill_ids]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if prefill_ids:  # else a tokenizer that drops the space before a first word joins two words
        streamer.token_cache = list(prefill_ids[-1:])
        streamer.print_len = len(tokenizer.decode(prefill_ids[-1:], skip_special_tokens=True))
    options = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([is_done])}
    errors: list[BaseException] = []
    ids: list[int] = []

    def generate() -> None:
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            output = _generate(model, tokenizer, [prompt], eos_ids, sampling, **options)
            ids.extend(output[0, len(prompt) :].tolist())
        except BaseException as error:  # raised again below, in the reader's thread
            errors.append(error)
            streamer.end()

    thread = Thread(target=generate, name="reply", daemon=True)
    thread.start()
    try:
        yield from _whole_characters(streamer)
    finally:
        closed = True
        thread.join()
    if errors:
        raise errors[0]
    return _decode_reply(tokenizer, ids, eos_ids)


def _whole_characters(deltas: Iterable[str]) -> Iterator[str]:
    """Yield the deltas without a last character that the length limit cut in half."""
    held = ""
    for delta in deltas:
        text = (held + delta).rstrip("\ufffd")
        held = (held + delta)[len(text) :]
        if text:
            yield text
