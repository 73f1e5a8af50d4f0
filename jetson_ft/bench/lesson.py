"""What every arm of a benchmark trains, and what is seen of it.

The same rows in the same steps, but where an arm's own packer chooses a step's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.data import lengths, read, store
from jetson_ft.device import probe
from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError
from jetson_ft.models import resolve, shapes
from jetson_ft.models.load import Weights
from jetson_ft.models.resolve import Base
from jetson_ft.paths import read_json, write_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs.pipeline import prepare_rows, weights_of
from jetson_ft.runs.worker import quieten

if TYPE_CHECKING:
    from jetson_ft.training.planner import Work

ROWS_PER_STEP = 8
_NEVER = 10**9


@dataclass(frozen=True)
class Settings:
    """What a person chooses; the arms are asked for by name, in their order."""

    model: str
    data: str
    rows: int
    max_length: int
    rank: int
    rounds: int
    threads: int
    arms: tuple[str, ...]
    llamafactory: str | None = None  # an interpreter that has it
    precision: str = "auto"

    def recipe(self) -> Recipe:
        """A constant rate without warm-up, so that no schedule differs between the arms.

        `tokens_per_step` counts rows here (see `Lesson.steps`); nothing is measured or saved
        between the steps.
        """
        train = {
            "epochs": 1.0, "schedule": "constant", "warmup_steps": 0,
            "tokens_per_step": ROWS_PER_STEP, "eval_every": _NEVER,
            "checkpoint_minutes": float(_NEVER),
        }  # fmt: skip
        return Recipe.model_validate(
            {
                "model": self.model,
                "data": {"train": self.data, "max_length": self.max_length},
                "precision": self.precision,
                "lora": {"rank": self.rank},
                "train": train,
            }
        )


@dataclass(frozen=True)
class Lesson:
    """Everything that an arm's process needs, as JSON on disk.

    `rows` (`input_ids`, `parts`) and `messages` are the same rows in the same order.
    """

    settings: Settings
    device: Device
    precision: str
    folder: str  # of the base
    gguf_file: str | None
    rows: list[dict[str, list[int]]]
    messages: list[list[dict[str, str]]]

    @property
    def base(self) -> Base:
        """The base model on disk."""
        return Base(self.settings.model, Path(self.folder), self.gguf_file)

    @property
    def weights(self) -> Weights:
        """How it is kept in memory."""
        return Weights(self.precision)

    def steps(self) -> list[list[int]]:
        """Indices of the rows of each optimizer step, as the product's schedule orders them.

        With each row counted as one token, a step of eight tokens is one of eight rows.
        """
        from jetson_ft.training.schedule import plan_steps

        train = self.settings.recipe().train
        return [[int(i) for i in step] for step in plan_steps([1] * len(self.rows), train)]

    def in_order(self) -> list[dict[str, list[int]]]:
        """The rows as they are trained, one step behind the other."""
        return [self.rows[index] for step in self.steps() for index in step]

    def timed_tokens(self) -> int:
        """Tokens, none of them padding, of all steps but the first, which warms up."""
        return sum(len(self.rows[i]["input_ids"]) for step in self.steps()[1:] for i in step)

    def work(self) -> Work:
        """The training as the planner sees it."""
        from jetson_ft.training.planner import Work

        sizes = [len(row["input_ids"]) for row in self.rows]
        learnt = [sum(1 for part in row["parts"] if part) for row in self.rows]
        recipe = self.settings.recipe()
        step = round(ROWS_PER_STEP * sum(sizes) / len(sizes))
        return Work(
            shape=shapes.of(self.base),
            weights=self.weights,
            lora=recipe.lora,
            train=recipe.train.model_copy(update={"tokens_per_step": step}),
            lengths=lengths.from_counts(sizes, learnt),
            heldout_tokens=0.0,
        )

    def write(self, path: Path) -> None:
        """For the processes of the arms."""
        write_json(path, asdict(self))


@dataclass
class Trained:
    """What was seen of a training."""

    ends: list[float] = field(default_factory=list)  # seconds, at the end of each step
    losses: list[float] = field(default_factory=list)  # nats, of each step
    timed_tokens: int | None = None  # where its steps are of other rows than the lesson's
    peak_memory_bytes: int | None = None
    plan: dict[str, Any] | None = None  # what ours chose
    computed_tokens: int | None = None  # of the timed ones; fewer where rows share their opening


def load(path: Path) -> Lesson:
    """The lesson that `Lesson.write` wrote."""
    found = read_json(path)
    found["settings"]["arms"] = tuple(found["settings"]["arms"])
    settings, device = Settings(**found.pop("settings")), Device(**found.pop("device"))
    return Lesson(settings=settings, device=device, **found)


def prepare(settings: Settings) -> Lesson:
    """Reads and tokenises the rows; loads torch, so it is called in a process of its own.

    Raises:
        UserError: model or rows can't be used, or there are too few rows for two steps.
    """
    quieten()
    recipe, device = settings.recipe(), probe.probe()
    base = resolve.resolve(settings.model)
    found = prepare_rows(recipe, base).train
    chosen = found.select(_choose(len(found), settings))
    return Lesson(
        settings=settings,
        device=device,
        precision=weights_of(recipe, device).precision,
        folder=str(base.folder),
        gguf_file=base.gguf_file,
        rows=[{key: list(row[key]) for key in ("input_ids", "parts")} for row in chosen],
        messages=_messages(settings.data, chosen["row"]),
    )


def _choose(available: int, settings: Settings) -> list[int]:
    """A seeded draw of whole steps, at least two: one to warm up and one to time."""
    import numpy as np

    count = min(available, settings.rows) // ROWS_PER_STEP * ROWS_PER_STEP
    if count < 2 * ROWS_PER_STEP:
        raise UserError(
            f"A benchmark needs at least {2 * ROWS_PER_STEP} rows: 8 to warm up, 8 to time.",
            f"{available} rows in {settings.data}, --rows {settings.rows}",
            "Take more rows.",
        )
    return [int(i) for i in np.random.default_rng(0).permutation(available)[:count]]


def _messages(data: str, numbers: Sequence[int]) -> list[list[dict[str, Any]]]:
    """The conversations of the rows of those numbers, for programs that tokenise themselves."""
    stored, _ = store.read(read.resolve(data))
    place = {number: index for index, number in enumerate(stored["row"])}
    return [list(stored[place[number]]["messages"]) for number in numbers]
