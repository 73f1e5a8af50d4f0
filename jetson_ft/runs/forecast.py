"""What a recipe would take in memory and time, here and on boards that are not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jetson_ft.data import lengths
from jetson_ft.data.lengths import Lengths
from jetson_ft.device import boards, probe
from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError
from jetson_ft.models import resolve, shapes
from jetson_ft.models.load import Weights
from jetson_ft.recipe import Recipe
from jetson_ft.runs.pipeline import prepare_rows, weights_of, work_of

if TYPE_CHECKING:
    from jetson_ft.training.planner import Plan, Work

HERE = "this machine"
_BUNDLED_HELDOUT, _AUTO_HELDOUT = 66, 60  # rows

Works = Callable[[Weights], "Work"]  # the work depends on how a device keeps the weights


@dataclass(frozen=True)
class Forecast:
    """One device and the plan that fits it; sizes in bytes."""

    name: str  # a board's, or `HERE`
    device: str
    precision: str
    memory: int  # free for the run
    least_memory: int  # that any plan takes
    plan: Plan | None  # None: nothing fits
    remedies: list[tuple[str, int]]  # settings that would fit, with their peaks

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's."""
        return self.name == HERE

    def as_json(self) -> dict[str, Any]:
        """For `plan --json`."""
        return {
            "name": self.name,
            "device": self.device,
            "precision": self.precision,
            "memory_bytes": self.memory,
            "fits": self.plan is not None,
            "least_memory_bytes": self.least_memory,
            "plan": self.plan.as_json() if self.plan else None,
            "would_fit": [
                {"settings": settings, "peak_memory_bytes": peak}
                for settings, peak in self.remedies
            ],
        }


@dataclass(frozen=True)
class Outlook:
    """The forecasts for a recipe and what they rest on."""

    devices: list[Forecast]
    sources: list[str]  # of the model's dimensions and of the rows' lengths
    assumptions: list[str]

    def as_json(self) -> dict[str, Any]:
        """For `plan --json`."""
        return {
            "schema": 1,
            "devices": [device.as_json() for device in self.devices],
            "sources": self.sources,
            "assumptions": self.assumptions,
        }


def outlook(recipe: Recipe, board: str | None = None) -> Outlook:
    """Plans the recipe for one board, or for this machine and for every board.

    Raises:
        UserError: no board is called so; or the model or rows are neither known nor in reach.
    """
    chosen = [boards.find(board)] if board else list(boards.BOARDS.values())
    works, sources = _works(recipe)
    here = [] if board else [forecast_here(works, recipe)]
    there = [_forecast_board(works, recipe, one) for one in chosen]
    return Outlook([*here, *there], sources, _assumptions())


def forecast_here(works: Works, recipe: Recipe) -> Forecast:
    """For this machine, whose arithmetic is timed for a moment."""
    from jetson_ft.training import memory

    device = probe.probe()
    flops = probe.measure_flops(device.kind, device.precision(recipe.precision))
    return _forecast(HERE, works(weights_of(recipe, device)), memory.with_own(device), flops)


def _forecast_board(works: Works, recipe: Recipe, board: boards.Board) -> Forecast:
    device = board.device()
    work = works(weights_of(recipe, device))
    return _forecast(board.name, work, device, board.flops(work.weights.precision))


def _forecast(name: str, work: Work, device: Device, flops: float) -> Forecast:
    from jetson_ft.training import planner

    plan = planner.best(work, device, flops)
    return Forecast(
        name=name,
        device=device.board or device.name,
        precision=str(work.weights),
        memory=device.memory_available,
        least_memory=planner.least_memory(work, device),
        plan=plan,
        remedies=[] if plan else planner.remedies(work, device),
    )


# --- what the forecasts rest on ------------------------------------------------------------------


def _works(recipe: Recipe) -> tuple[Works, list[str]]:
    """From what is built in where that is enough, else from the model's config and the rows."""
    from jetson_ft.training.planner import Work

    shape = shapes.KNOWN.get(recipe.model)
    found = lengths.KNOWN.get((recipe.data.train, recipe.model))
    if shape is None or found is None:
        return _works_of_files(recipe)
    train, heldout = _split(recipe, found)

    def works(weights: Weights) -> Work:
        return Work(shape, weights, recipe.lora, recipe.train, train, heldout * train.mean)

    return works, [
        f"model: built-in dimensions of {recipe.model}; no file was read",
        f"rows: built-in lengths of {recipe.data.train}, {found.rows:,} rows; no file was read",
    ]


def _works_of_files(recipe: Recipe) -> tuple[Works, list[str]]:
    try:
        base = resolve.resolve(recipe.model, weights=False)
        rows = prepare_rows(recipe, base)
    except UserError as error:
        known = "; ".join(f"{data} with {model}" for data, model in lengths.KNOWN)
        fix = f"{error.fix} Planned without any file: {known}.".strip()
        raise UserError(error.what, error.where, fix) from error
    return lambda weights: work_of(recipe, weights, base, rows), [
        f"model: config of {recipe.model}; no weights were read",
        f"rows: {len(rows.train):,} read from {recipe.data.train} and tokenised",
    ]


def _split(recipe: Recipe, known: Lengths) -> tuple[Lengths, int]:
    """Rows to learn, and how many are held out; of a held-out file the size is guessed.

    Rows over the length count as cut where they would be dropped: a little too many tokens.
    """
    data = recipe.data
    rows = known.cut(data.max_length)
    if isinstance(data.heldout, int):
        count = min(data.heldout, rows.rows - 1)
    elif data.train == "bundled":
        return rows, _BUNDLED_HELDOUT
    else:
        count = _AUTO_HELDOUT
    return replace(rows, rows=rows.rows - count), count


def _assumptions() -> list[str]:
    from jetson_ft.training.planner import COSTS

    return [
        f"Boards reach {COSTS['cuda'].efficiency[2]:.0%} of their FP16 peak in training (assumed).",
        "That peak is inferred from cores and clock: 16 operations a core and cycle.",
        "An 8 GB module has 5.2 GB for a run; other sizes by a rule from that one.",
        "Early stopping is not foreseen; writing replies for the comparison is not counted.",
        "Predicted; no board has run this yet.",
        "On an H100 what torch allocates was within 6.1%; process and driver: unmeasured.",
    ]
