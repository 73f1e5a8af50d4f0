"""Writing replies: one at a time as a stream, or many at once for a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

from jetson_ft.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuses what generation can't use.

        Raises:
            UserError: naming the value and its range.
        """
        for name, low, high in (
            ("max_new_tokens", 1, 32768), ("temperature", 0, 10), ("top_k", 0, 1_000_000),
            ("top_p", 1e-6, 1), ("repetition_penalty", 0.01, 10), ("seed", 0, 2**63 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name} can't be {value:g}.", fix=f"From {low:g} to {high:g}.")

    def options(self) -> dict[str, Any]:
        """The same for transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return options


@dataclass(frozen=True)
class Reply:
    """A finished reply."""

    text: str
    tokens: int
    ended: bool  # by an end token, not by the length limit


def reply_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
    batch_size: int = 36,
) -> list[Reply]:
    """Greedy replies to all prompts, in their order; `progress` hears how many are done.

    Prompts of similar length share a batch: padding is computed like anything else.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, Reply] = {}
    widths = [len(prompts[index]) for index in order]
    for start, end in batches(widths, batch_size, _STEP_COST * max_new_tokens):
        batch = [prompts[index] for index in order[start:end]]
        found = _reply_batch(model, tokenizer, batch, ends, max_new_tokens)
        replies |= zip(order[start:end], found, strict=True)
        progress(len(replies))
    return [replies[index] for index in range(len(prompts))]


# One step of a batch, whose weights have to be read whole, in tokens of a prompt. About that on
# CPUs and GPUs alike: it is their ratio of arithmetic to memory speed.
_STEP_COST = 32


def batches(widths: Sequence[int], at_most: int, overhead: float) -> list[tuple[int, int]]:
    """Cuts ascending lengths into batches of least total cost, as (start, end).

    A batch costs its rows times its longest, padding included, and `overhead`. Found by
    dynamic programming over the last batch's start.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(widths) + 1):
        starts = range(max(0, end - at_most), end)
        best.append(min((best[s][0] + (end - s) * widths[end - 1] + overhead, s) for s in starts))
    cuts, end = [], len(widths)
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    return cuts[::-1]


def _reply_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], ends: Sequence[int], limit: int
) -> list[Reply]:
    import torch

    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            eos_token_id=list(ends),
            pad_token_id=pad,
            use_cache=True,
            **Sampling(max_new_tokens=limit).options(),
        )
    return [_finish(tokenizer, row[width:].tolist(), ends) for row in output]


def _finish(tokenizer: Any, ids: list[int], ends: Sequence[int]) -> Reply:
    """Cuts a row of new ids at its first end token."""
    for position, token in enumerate(ids):
        if token in ends:
            return Reply(_decode(tokenizer, ids[:position]), position + 1, True)
    return Reply(_decode(tokenizer, ids), len(ids), False)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of the ids; a character cut in half by the length limit is left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd").strip()


def stream(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    ends: Sequence[int],
    sampling: Sampling,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """Pieces of one reply as they are written; ends early once `stopped()` is true.

    Generation runs in a thread of its own; leaving the iterator ends it.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    left = False

    class _Asked(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            over = left or stopped()
            return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    faults: list[BaseException] = []

    def work() -> None:
        device = model.get_input_embeddings().weight.device
        ids = torch.tensor([prompt], device=device)
        try:
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    eos_token_id=list(ends),
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=streamer,
                    use_cache=True,
                    stopping_criteria=StoppingCriteriaList([_Asked()]),
                    **sampling.options(),
                )
        except BaseException as error:  # handed over to the reader below
            faults.append(error)
            streamer.end()

    worker = Thread(target=work, name="reply", daemon=True)
    worker.start()
    try:
        yield from _whole_characters(streamer)
    finally:
        left = True
        worker.join()
    if faults:
        raise faults[0]


def _whole_characters(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces without a last character that the length limit cut in half."""
    held = ""
    for piece in pieces:
        text = (held + piece).rstrip("\ufffd")
        held = (held + piece)[len(text) :]
        if text:
            yield text
