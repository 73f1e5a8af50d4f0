"""What would be trained on, before anything is: for `train --dry-run` and `data inspect`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jetson_ft.data import read, store, tokens
from jetson_ft.data.formats import Message
from jetson_ft.data.template import CONTEXT, encode
from jetson_ft.models import load, resolve
from jetson_ft.recipe import Recipe
from jetson_ft.runs.forecast import Forecast, forecast_here
from jetson_ft.runs.pipeline import prepare_rows, work_of

Pieces = list[tuple[str, bool]]  # text, whether it is learnt


@dataclass(frozen=True)
class DryRun:
    """A recipe's rows, tokens and steps; no weights are loaded."""

    recipe: Recipe
    rows: dict[str, Any]
    steps: int
    tokens: int  # over all planned steps
    rows_per_step: float
    forecast: Forecast  # of this machine

    def as_json(self) -> dict[str, Any]:
        """For `train --dry-run --json`."""
        return {
            "schema": 1,
            "recipe": self.recipe.model_dump(),
            "rows": self.rows,
            "steps": self.steps,
            "tokens": self.tokens,
            "rows_per_step": self.rows_per_step,
            "forecast": self.forecast.as_json(),
        }


def dry_run(recipe: Recipe) -> DryRun:
    """Reads and tokenises as a run would, and plans its steps."""
    from jetson_ft.training.schedule import plan_steps

    base = resolve.resolve(recipe.model, weights=False)
    rows = prepare_rows(recipe, base)
    lengths = tokens.token_counts(rows.train)
    steps = plan_steps(lengths, recipe.train)
    return DryRun(
        recipe=recipe,
        rows=rows.report,
        steps=len(steps),
        tokens=int(sum(lengths[step].sum() for step in steps)),
        rows_per_step=sum(map(len, steps)) / max(1, len(steps)),
        forecast=forecast_here(lambda weights: work_of(recipe, weights, base, rows), recipe),
    )


@dataclass(frozen=True)
class Inspection:
    """A source of rows, what became of it, and how a model would see it."""

    read: dict[str, Any]
    model: str
    max_length: int
    tokens: dict[str, Any]
    previews: list[Pieces]


def inspect(
    name: str,
    model: str = "embedded",
    max_length: int = 1024,
    samples: int = 3,
    layout: str = "auto",
    encoding: str = "auto",
) -> Inspection:
    """Reads every row (unusable ones are counted, not refused) and tokenises it.

    Raises:
        UserError: the source or the model can't be read, or no row is usable.
    """
    rows, found = store.read(read.resolve(name), layout=layout, encoding=encoding, bad_rows="skip")
    tokenizer = load.load_tokenizer(resolve.resolve(model, weights=False))
    key = f"{found.sha256}-{found.layout}-{encoding}-inspect"
    _, report = tokens.tokenise(rows, key, tokenizer, max_length)
    chosen = [number * len(rows) // samples for number in range(min(samples, len(rows)))]
    return Inspection(
        read=asdict(found),
        model=model,
        max_length=max_length,
        tokens=report.as_json(),
        previews=[pieces(tokenizer, rows[index]["messages"]) for index in chosen],
    )


def pieces(tokenizer: Any, messages: list[Message]) -> Pieces:
    """A row as the model sees it: runs of text, learnt or only read."""
    encoded = encode(tokenizer, messages)
    result: Pieces = []
    start = 0
    for end in range(1, len(encoded.ids) + 1):
        if end == len(encoded.ids) or _learnt(encoded.parts, end) != _learnt(encoded.parts, start):
            result.append((tokenizer.decode(encoded.ids[start:end]), _learnt(encoded.parts, start)))
            start = end
    return result


def _learnt(parts: list[int], position: int) -> bool:
    return parts[position] != CONTEXT
