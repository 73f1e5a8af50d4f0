"""What all variants of a benchmark train, and the result of one of them.

They train the same rows in the same steps, except those whose own packer chooses a step's rows.
`python -m jetson_ft.bench.workload SETTINGS FILE` writes the workload for settings as JSON.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from jetson_ft.data import lengths, sources, store
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.errors import UserError, _
from jetson_ft.files import write_atomic, write_json
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.models import catalog, files, loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, weight_format
from jetson_ft.recipe import Recipe, TrainRecipe
from jetson_ft.runs.exit_status import EXIT_REFUSED
from jetson_ft.runs.processes import silence_libraries

if TYPE_CHECKING:
    from jetson_ft.training.cost_model import Workload

ROWS_PER_STEP = 8
_NEVER = 10**9


@dataclass(frozen=True)
class Settings:
    """The options of the command; `variants` are names, in the order of the table."""

    model: str
    data: str
    rows: int
    max_length: int
    rank: int
    rounds: int
    threads: int
    variants: tuple[str, ...]
    llamafactory: str | None = None  # an interpreter that has it
    precision: str = "auto"

    def recipe(self) -> Recipe:
        """Return the recipe of all variants.

        The learning rate is constant, so that no schedule differs between the variants. Each row
        counts as one token, so that `tokens_per_step` is the number of rows in a step.
        """
        train = TrainRecipe(
            epochs=1,
            lr_scheduler="constant",
            warmup_steps=0,
            tokens_per_step=ROWS_PER_STEP,
            eval_every=_NEVER,
            save_minutes=_NEVER,
        )
        data = {"train": self.data, "max_length": self.max_length}
        values = {"model": self.model, "precision": self.precision, "lora": {"rank": self.rank}}
        return Recipe.model_validate({**values, "data": data, "train": train})


@dataclass(frozen=True)
class BenchWorkload:
    """Everything that the process of a variant needs.

    `rows` (`input_ids`, `segments`, `supervised`) and `messages` are the same rows in the same
    order.
    """

    settings: Settings
    device: Device
    base: BaseModelFiles
    weights: WeightFormat
    rows: list[dict[str, Any]]
    messages: list[list[dict[str, str]]]

    def steps(self) -> list[list[int]]:
        """Return the indices of each optimizer step's rows, in the order of a run."""
        from jetson_ft.training.batches import plan_steps

        steps = plan_steps([1] * len(self.rows), self.settings.recipe().train)
        return [step.tolist() for step in steps]

    def rows_in_order(self) -> list[dict[str, Any]]:
        """Return the rows in training order, all steps joined."""
        return [self.rows[index] for step in self.steps() for index in step]

    def timed_tokens(self) -> int:
        """Return the tokens of all steps but the first, which is the warm-up."""
        return sum(len(self.rows[i]["input_ids"]) for step in self.steps()[1:] for i in step)

    def planner_workload(self) -> Workload:
        """Return the training as the planner needs it."""
        from jetson_ft.training.cost_model import Workload

        sizes = [len(row["input_ids"]) for row in self.rows]
        supervised = [row["supervised"] for row in self.rows]
        recipe = self.settings.recipe()
        tokens_per_step = round(ROWS_PER_STEP * sum(sizes) / len(sizes))
        return Workload(
            dims=catalog.model_dims(self.base),
            weights=self.weights,
            lora=recipe.lora,
            train=recipe.train.model_copy(update={"tokens_per_step": tokens_per_step}),
            lengths=lengths.lengths_from_counts(sizes, supervised),
            heldout_tokens=0.0,
        )

    def training_arguments(self, folder: str, batch: int) -> dict[str, Any]:
        """Return the recipe as transformers' TrainingArguments, with `batch` rows at a time."""
        train = self.settings.recipe().train
        return {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": ROWS_PER_STEP // batch,
            "num_train_epochs": train.epochs,
            "learning_rate": train.learning_rate,
            "lr_scheduler_type": train.lr_scheduler,
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.max_grad_norm,
            "seed": train.seed,
            "bf16": self.weights.precision == "bf16",
            "fp16": self.weights.precision == "fp16",
            "use_cpu": self.device.kind == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }

    def write(self, path: Path) -> None:
        """Write the workload to a file, for `load_workload`."""
        write_atomic(path, _ADAPTER.dump_json(self))


@dataclass
class Result:
    """The result of a variant's training."""

    step_ends: list[float] = field(default_factory=list)  # seconds, on `time.perf_counter`
    losses: list[float] = field(default_factory=list)  # nats per token, of each step
    timed_tokens: int | None = None  # where the steps have other rows than the workload's
    peak_memory_bytes: int | None = None
    plan: dict[str, Any] | None = None  # chosen by the planner; this program's variants only
    # Timed tokens that pass through the layers: fewer where rows share a prefix. None: all.
    computed_tokens: int | None = None


_ADAPTER = TypeAdapter(BenchWorkload)


def load_workload(path: Path) -> BenchWorkload:
    """Return the workload that `BenchWorkload.write` wrote."""
    return _ADAPTER.validate_json(path.read_bytes())


def prepare_workload(settings: Settings) -> BenchWorkload:
    """Read and tokenize the rows, and draw whole steps of them, at least two. Loads torch.

    Raises:
        UserError: model or rows can't be used, or there are too few rows for two steps.
    """
    import numpy as np

    silence_libraries()
    recipe, device = settings.recipe(), detect.detect_device()
    base = files.resolve_model(settings.model)
    rows = prepare_rows(recipe.data, loading.load_tokenizer(base)).train
    count = min(len(rows), settings.rows) // ROWS_PER_STEP * ROWS_PER_STEP
    if count < 2 * ROWS_PER_STEP:
        raise UserError(
            _("A benchmark needs at least {least} rows: 8 to warm up, 8 to time."),
            f"{len(rows)} rows in {settings.data}, --rows {settings.rows}",
            _("Use more rows."),
            least=2 * ROWS_PER_STEP,
        )
    rows = rows.select(np.random.default_rng(0).permutation(len(rows))[:count])
    # For programs that tokenize themselves, the conversations of the same rows.
    stored, _report = store.read_source(sources.resolve_source(settings.data))
    index_of = {number: index for index, number in enumerate(stored["row"])}
    messages = (stored[index_of[number]]["messages"] for number in rows["row"])
    return BenchWorkload(
        settings=settings,
        device=device,
        base=base,
        weights=weight_format(recipe, device),
        rows=list(rows.select_columns(["input_ids", "segments", "supervised"])),
        messages=[[{key: m[key] for key in ("role", "content")} for m in row] for row in messages],
    )


def main(settings: str, workload_file: Path) -> int:
    """Write the workload, or the error of settings that can't be used; return the exit code."""
    try:
        prepare_workload(TypeAdapter(Settings).validate_json(settings)).write(workload_file)
    except UserError as error:
        write_json(workload_file, error.as_json())
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
