"""What a run will read and need, without training: its rows, steps, memory and time.

Memory and time are predicted for this machine and for every known board.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from jetson_ft.adapter import check_target_modules
from jetson_ft.data import lengths, sources, store, tokenize
from jetson_ft.data.chat_template import CONTEXT, encode
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.lengths import LengthHistogram
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.hardware import boards, detect
from jetson_ft.hardware.detect import Device
from jetson_ft.models import catalog, files, loading
from jetson_ft.models.dims import Coverage
from jetson_ft.models.loading import WeightFormat, weight_format
from jetson_ft.recipe import Recipe
from jetson_ft.training import memory, planner
from jetson_ft.training.batches import plan_steps
from jetson_ft.training.cost_model import COST_MODELS, Workload, describe_workload
from jetson_ft.training.planner import Plan

THIS_MACHINE = "this machine"
_ANY_WEIGHTS = WeightFormat("bf16")  # `_forecast` puts the device's own in its place
_BUNDLED_HELDOUT, _AUTO_HELDOUT = 66, 60  # rows

PreviewSegments = list[tuple[str, bool]]  # text, and whether it is trained on


@dataclass(frozen=True)
class DeviceForecast:
    """A device and the plan that fits it."""

    name: str  # a board's, or `THIS_MACHINE`
    device: str
    precision: str
    memory_bytes: int  # free for the run
    least_memory_bytes: int  # of the smallest plan
    fits: bool
    plan: Plan | None  # None: nothing fits
    would_fit: list[dict[str, Any]]  # `settings` that fit, with their `peak_memory_bytes`

    @property
    def is_this_machine(self) -> bool:
        return self.name == THIS_MACHINE


@dataclass(frozen=True)
class Forecast:
    devices: list[DeviceForecast]
    sources: list[str]  # of the model's dimensions and of the rows' lengths
    assumptions: list[str]
    coverage: Coverage  # of the model by adapters and quantization

    def as_json(self) -> dict[str, Any]:
        """Return the object that `plan --json` prints."""
        return {"schema": 1, **asdict(self), "coverage": self.coverage.as_json()}


def forecast_recipe(recipe: Recipe, board: str | None = None) -> Forecast:
    """Plan the recipe for one board, or for this machine and for every board."""
    entries = [boards.find_board(board)] if board else list(boards.BOARDS.values())
    workload, origins = _describe(recipe)
    devices = [] if board else [forecast_here(recipe, workload)]
    for entry in entries:
        device = entry.device()
        flops = entry.flops(device.precision(recipe.precision))
        devices.append(_forecast(entry.name, recipe, workload, device, flops))
    efficiency = COST_MODELS["cuda"].efficiency[2]
    assumptions = [
        f"Boards reach {efficiency:.0%} of their FP16 peak in training (assumed).",
        "That peak is inferred from cores and clock: 16 operations per core and cycle.",
        "An 8 GB module has 5.2 GB for a run; other sizes by a rule from that one.",
        "Early stopping is not foreseen; writing replies for the comparison is not counted.",
        "Predicted; no board has run this yet.",
        "On an H100 what torch allocates was within 6.1%; process and driver: unmeasured.",
    ]
    return Forecast(devices, origins, assumptions, _coverage(recipe, workload))


def _coverage(recipe: Recipe, workload: Workload) -> Coverage:
    weights = replace(workload.weights, quantize=recipe.quantize)
    return replace(workload, weights=weights).coverage


def forecast_here(recipe: Recipe, workload: Workload) -> DeviceForecast:
    """Return the forecast for this machine; its FLOP/s are measured for a moment."""
    device = detect.detect_device()
    flops = detect.measure_flops(device.kind, device.precision(recipe.precision))
    return _forecast(THIS_MACHINE, recipe, workload, memory.with_own_memory(device), flops)


def _forecast(
    name: str, recipe: Recipe, workload: Workload, device: Device, flops: float
) -> DeviceForecast:
    workload = replace(workload, weights=weight_format(recipe, device))
    plan = planner.best_plan(workload, device, flops)
    suggestions = [] if plan else planner.suggestions(workload, device)
    return DeviceForecast(
        name=name,
        device=device.board or device.name,
        precision=str(workload.weights),
        memory_bytes=device.memory_available,
        least_memory_bytes=planner.least_memory(workload, device),
        fits=plan is not None,
        plan=plan,
        would_fit=[{"settings": text, "peak_memory_bytes": peak} for text, peak in suggestions],
    )


# --- sources -----------------------------------------------------------------------------------


def _describe(recipe: Recipe) -> tuple[Workload, list[str]]:
    """Return the workload by built-in dimensions and lengths, or by files; and its sources."""
    dims = catalog.KNOWN_DIMS.get(recipe.model)
    known = lengths.KNOWN_LENGTHS.get((recipe.data.train, recipe.model))
    if dims and known:
        train, heldout = _split(recipe, known)
        check_target_modules(dims, recipe.lora.target_modules)
        others = recipe.lora, recipe.train, train, heldout * train.mean
        return Workload(dims, _ANY_WEIGHTS, *others), [
            f"model: built-in dimensions of {recipe.model}; no file was read",
            f"rows: built-in lengths of {recipe.data.train}, {known.rows:,} rows; no file was read",
        ]
    try:
        base = files.resolve_model(recipe.model, weights=False)
        rows = prepare_rows(recipe.data, loading.load_tokenizer(base))
    except UserError as error:
        planned = "; ".join(f"{data} with {model}" for data, model in lengths.KNOWN_LENGTHS)
        fix = Message(_("Planned without any file: {known}."), {"known": planned})
        fixes = [error.fix, fix] if str(error.fix) else [fix]
        raise UserError(error.what, error.where, joined(fixes, " ")) from error
    return describe_workload(recipe, _ANY_WEIGHTS, base, rows), [
        f"model: config of {recipe.model}; no weights were read",
        f"rows: {len(rows.train):,} read from {recipe.data.train} and tokenized",
    ]


def _split(recipe: Recipe, known: LengthHistogram) -> tuple[LengthHistogram, int]:
    """Return the lengths of the training rows, and the number of held-out rows.

    The number of rows in a held-out file is an estimate. All rows above the length limit count as
    truncated, also those that would be dropped.
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


# --- dry run and inspection -------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """A recipe's rows, tokens and steps."""

    recipe: Recipe
    rows: dict[str, Any]
    steps: int
    tokens: int  # over all planned steps
    rows_per_step: float
    forecast: DeviceForecast  # of this machine
    coverage: Coverage  # of the model by adapters and quantization

    def as_json(self) -> dict[str, Any]:
        """Return the object that `train --dry-run --json` prints."""
        recipe, coverage = self.recipe.model_dump(), self.coverage.as_json()
        return {"schema": 1, **asdict(self), "recipe": recipe, "coverage": coverage}


def dry_run(recipe: Recipe) -> DryRun:
    """Read and tokenize the rows as a run would, and plan its steps; load no weights."""
    base = files.resolve_model(recipe.model, weights=False)
    rows = prepare_rows(recipe.data, loading.load_tokenizer(base))
    lengths = tokenize.token_counts(rows.train)
    steps = plan_steps(lengths, recipe.train)
    workload = describe_workload(recipe, _ANY_WEIGHTS, base, rows)
    return DryRun(
        recipe=recipe,
        rows=rows.report,
        steps=len(steps),
        tokens=int(sum(lengths[step].sum() for step in steps)),
        rows_per_step=sum(map(len, steps)) / max(1, len(steps)),
        forecast=forecast_here(recipe, workload),
        coverage=_coverage(recipe, workload),
    )


@dataclass(frozen=True)
class Inspection:
    """The report of reading a source of rows, and some rows as a model reads them."""

    read: dict[str, Any]
    model: str
    max_length: int
    tokens: dict[str, Any]
    previews: list[PreviewSegments]


def inspect_data(
    name: str,
    model: str = "embedded",
    max_length: int = 1024,
    samples: int = 3,
    layout: str = "auto",
    encoding: str = "auto",
) -> Inspection:
    """Read and tokenize every row; unusable ones are counted, not refused.

    Args:
        name: a source, as `data.train` names it.
        model: the one whose tokenizer is used.
        max_length: tokens at which a row is truncated.
        samples: number of rows to preview, evenly spread.
    """
    rows, read_report = store.read_source(
        sources.resolve_source(name), layout=layout, encoding=encoding, on_invalid="skip"
    )
    tokenizer = loading.load_tokenizer(files.resolve_model(model, weights=False))
    _tokens, token_report = tokenize.tokenize_rows(
        rows, read_report.cache_key, tokenizer, max_length
    )
    chosen = [number * len(rows) // samples for number in range(min(samples, len(rows)))]
    return Inspection(
        read=asdict(read_report),
        model=model,
        max_length=max_length,
        tokens=asdict(token_report),
        previews=[preview_segments(tokenizer, rows[index]["messages"]) for index in chosen],
    )


def preview_segments(tokenizer: Any, messages: list[ChatMessage]) -> PreviewSegments:
    """Return a row as the model reads it: stretches of text, trained on or context."""
    encoded = encode(tokenizer, messages)
    tokens = zip(encoded.ids, encoded.segments, strict=True)
    return [
        (tokenizer.decode([token for token, _segment in group]), is_trained)
        for is_trained, group in groupby(tokens, key=lambda pair: pair[1] != CONTEXT)
    ]
