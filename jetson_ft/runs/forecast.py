"""What a run will read and need, without training: its rows, steps, memory and time.

Memory and time are predicted for this machine and for every known board.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from jetson_ft import hub
from jetson_ft.adapter import check_target_modules
from jetson_ft.data import lengths, sources, split, tokenize
from jetson_ft.data.lengths import LengthHistogram
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.data.template_files import read_template
from jetson_ft.errors import Message, UserError, _, messages_as_json
from jetson_ft.hardware import boards, detect
from jetson_ft.hardware.detect import Device
from jetson_ft.models import catalog, files, loading, positions
from jetson_ft.models.dims import Coverage, ModelDims
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, weight_format
from jetson_ft.recipe import Recipe
from jetson_ft.runs import disk
from jetson_ft.training import memory, planner
from jetson_ft.training.batches import plan_steps
from jetson_ft.training.cost_model import COST_MODELS, Workload, describe_workload
from jetson_ft.training.planner import Plan

THIS_MACHINE = "this machine"
_ANY_WEIGHTS = WeightFormat("bf16")  # `forecast_device` puts the device's own in its place


@dataclass(frozen=True)
class DeviceForecast:
    """A device and the plan that fits it."""

    name: str  # a board's, or `THIS_MACHINE`
    device: str
    precision: str
    memory_limited: bool  # memory_bytes are limited by a control group
    memory_bytes: int  # free for the run
    least_memory_bytes: int  # of the smallest plan
    fits: bool
    plan: Plan | None  # None: nothing fits
    would_fit: list[dict[str, Any]]  # `settings` that fit, with their `peak_memory_bytes`

    @property
    def peak_memory_bytes(self) -> int:
        """Predicted peak, of the smallest plan where none fits."""
        return self.plan.peak_memory_bytes if self.plan else self.least_memory_bytes

    @property
    def is_this_machine(self) -> bool:
        return self.name == THIS_MACHINE


@dataclass(frozen=True)
class Forecast:
    devices: list[DeviceForecast]
    sources: list[str]  # of the model's dimensions and of the rows' lengths
    assumptions: list[str]
    coverage: Coverage  # of the model by adapters and quantization
    disk_bytes: int  # of checkpoints and adapter

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
        devices.append(forecast_device(entry.name, recipe, workload, device, flops))
    efficiency = COST_MODELS["cuda"].efficiency[2]
    assumptions = [
        f"Boards reach {efficiency:.0%} of their FP16 peak in training (assumed).",
        "That peak is inferred from cores and clock: 16 operations per core and cycle.",
        "An 8 GB module has 5.2 GB for a run; other sizes by a rule from that one.",
        "Early stopping is not foreseen. `besides`: loading and the comparison's replies.",
        "Predicted; no board has run this yet.",
        "On an H100 what torch allocates was within 6.1%; process and driver: unmeasured.",
    ]
    coverage = workload.dims.coverage(recipe.lora.rank, recipe.lora.target_modules, recipe.quantize)
    disk_bytes = disk.checkpoint_bytes(recipe, workload.dims)
    return Forecast(devices, origins, assumptions, coverage, disk_bytes)


def forecast_here(recipe: Recipe, workload: Workload) -> DeviceForecast:
    """Return the forecast for this machine; its FLOP/s are measured for a moment."""
    device = detect.detect_device()
    flops = detect.measure_flops(device.kind, device.precision(recipe.precision))
    return forecast_device(THIS_MACHINE, recipe, workload, memory.with_own_memory(device), flops)


def forecast_device(
    name: str, recipe: Recipe, workload: Workload, device: Device, flops: float
) -> DeviceForecast:
    workload = replace(workload, weights=weight_format(recipe, device))
    plan = planner.best_plan(workload, device, flops)
    suggestions = [] if plan else planner.suggestions(workload, device)
    return DeviceForecast(
        name=name,
        device=device.board or device.name,
        precision=str(workload.weights),
        memory_limited=device.memory_limited,
        memory_bytes=device.memory_available,
        least_memory_bytes=planner.least_memory(workload, device),
        fits=plan is not None,
        plan=plan,
        would_fit=[{"settings": text, "peak_memory_bytes": peak} for text, peak in suggestions],
    )


# --- sources -----------------------------------------------------------------------------------


def _describe(recipe: Recipe) -> tuple[Workload, list[str]]:
    """Return the workload by built-in dimensions and lengths, or by files; and its sources.

    Of a model in the catalog nothing is downloaded. Lengths are estimated for rows that have
    built-in lengths for another tokenizer, and where the model's tokenizer is not on this machine.
    """
    data, dims = recipe.data, catalog.known_dims(recipe.model)
    # Of several sources no lengths are known: they are read.
    train = data.train if isinstance(data.train, str) else ""
    known = base = None
    if dims:
        known = lengths.KNOWN_LENGTHS.get((train, recipe.model))
        model_source = f"model: built-in dimensions of {recipe.model}; no file was read"
    else:
        base = _files_of_unknown_model(recipe.model)
        dims = catalog.model_dims(base)
        model_source = f"model: config of {recipe.model}; no weights were read"
    check_target_modules(dims, recipe.lora.target_modules)
    if data.chat_template:
        read_template(data.chat_template)  # also where no row is rendered
    if known:
        source = f"built-in lengths of {train}, {known.rows:,} rows; no file was read"
        return workload_of(recipe, dims, known), [model_source, f"rows: {source}"]
    scaled = scaled_lengths(train, dims.vocabulary)
    accuracy = lengths.accuracy_of_estimate(dims.vocabulary)
    if base is None and (train == "bundled" or not scaled):
        base = files_here(recipe.model)
    has_tokenizer = base and (base.gguf_file or files.has_tokenizer(base.folder))
    # A known data set on the Hub is large: it is neither downloaded nor tokenized for a prediction.
    if scaled and not (has_tokenizer and train == "bundled"):
        source = f"built-in lengths of {train} for another tokenizer, converted"
        return workload_of(recipe, dims, scaled), [model_source, f"rows: {source} ({accuracy})"]
    try:
        if base and has_tokenizer:
            rows = prepare_rows(data, loading.load_tokenizer(base, data.chat_template))
            positions.check_longest_row(base, rows.longest)
            source = f"rows: {len(rows.train):,} read from {data.train_names()} and tokenized"
            return describe_workload(recipe, _ANY_WEIGHTS, base, rows), [model_source, source]
        rows_read, heldout, info = split.split_rows(data)
    except UserError as error:
        names = ", ".join(dict.fromkeys(name for name, _model in lengths.KNOWN_LENGTHS))
        fix = Message(_("Planned without their file: {names}."), {"names": names})
        raise error.with_fix(fix) from error
    estimated, estimated_heldout = (
        lengths.estimate_lengths(part["messages"], dims.vocabulary, data.max_length)
        for part in (rows_read, heldout)
    )
    workload = Workload(
        dims, _ANY_WEIGHTS, recipe.lora, recipe.train, estimated, estimated_heldout.tokens
    )
    count = sum(part.read.rows_kept for part in info.sources)
    source = f"{count:,} read from {data.train_names()}"
    source += f"; tokens estimated from characters ({accuracy}): no tokenizer here"
    return workload, [model_source, f"rows: {source}"]


def files_here(model: str) -> BaseModelFiles | None:
    """Return a known model's files as far as they are on this machine."""
    if model == "embedded":
        return files.resolve_model(model)
    folder = hub.cached_folder(model, "model")
    return BaseModelFiles(model, folder) if folder else None


def _files_of_unknown_model(model: str) -> BaseModelFiles:
    """Return a model's files without its weights; of one on the Hub its config is enough."""
    try:
        return files.resolve_model(model, weights=False)
    except UserError as error:
        if error.__cause__ is not None and files.is_hub_id(model):  # of the Hub's client
            base = files_here(model)
            if base and (base.folder / "config.json").is_file():
                return base
        fix = _("`jetson-ft models` lists the models that are planned without their files.")
        fixes = [Message(fix)]
        if near := catalog.nearest_name(model):
            fixes.insert(0, Message(_("Did you mean `{near}`?"), {"near": near}))
        raise error.with_fix(*fixes) from error


def scaled_lengths(train: str, vocabulary: int) -> LengthHistogram | None:
    """Return the known lengths of a data set for a tokenizer with that vocabulary, or None."""
    for (name, model), histogram in lengths.KNOWN_LENGTHS.items():
        if name == train:
            counted = catalog.KNOWN_DIMS[model].vocabulary
            return histogram.scaled(lengths.token_factor(counted, vocabulary))
    return None


def workload_of(recipe: Recipe, dims: ModelDims, known: LengthHistogram) -> Workload:
    """Return the workload of training on a source with known lengths, some rows of it held out.

    The number of rows in a held-out file is an estimate. All rows above the length limit count as
    truncated, also those that would be dropped.
    """
    data = recipe.data
    rows = known.cut(data.max_length)
    heldout = min(split.AUTO_HELDOUT, max(1, rows.rows // 10))
    bundled = sources.BUNDLED.get(data.train_names())
    if bundled and not isinstance(data.heldout, int):
        train, heldout = rows, bundled.heldout_rows
    else:
        if isinstance(data.heldout, int):
            heldout = data.heldout
        heldout = min(heldout, rows.rows - 1)
        train = replace(rows, rows=rows.rows - heldout)
    return Workload(
        dims, _ANY_WEIGHTS, recipe.lora, recipe.train, train, heldout * train.mean,
        heldout_rows=heldout, longest_prompt=train.longest_prompt,
        reply_tokens=recipe.eval.max_new_tokens,
    )  # fmt: skip


# --- all known models -------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelForecast:
    """A known model, and in which weight format it is trained on modules of each memory size."""

    name: str
    parameters: int
    file_bytes: int
    licence: str
    gated: bool
    # By memory in GiB: the largest `format` that fits with its `peak_memory_bytes`, or None.
    fits: dict[int, dict[str, Any] | None]


def forecast_models() -> tuple[Recipe, list[ModelForecast]]:
    """Plan one job for each known model on each class of boards; return the job's recipe too."""
    job = Recipe.model_validate({"data": {"train": "llamafactory/alpaca_zh", "max_length": 1024}})
    forecasts = []
    for name, model in catalog.MODELS.items():
        known = scaled_lengths(job.data.train_names(), model.dims.vocabulary)
        assert known is not None
        workload = workload_of(job, model.dims, known)
        forecast = ModelForecast(
            name=name,
            parameters=model.dims.parameters,
            file_bytes=model.file_bytes,
            licence=model.licence,
            gated=model.gated,
            fits={
                memory_gib: _largest_format(workload, board.device())
                for memory_gib, board in sorted(boards.BOARD_CLASSES.items())
            },
        )
        forecasts.append(forecast)
    return job, forecasts


def built_in(recipe: Recipe) -> tuple[ModelDims, LengthHistogram, bool] | None:
    """Return a model's dimensions, its rows' lengths, and whether these were counted for it.

    None where one of them isn't built in.
    """
    dims, data = catalog.known_dims(recipe.model), recipe.data.train
    if dims is None or not isinstance(data, str):
        return None
    if counted := lengths.KNOWN_LENGTHS.get((data, recipe.model)):
        return dims, counted, True
    scaled = scaled_lengths(data, dims.vocabulary)
    return (dims, scaled, False) if scaled else None


def forecast_built_in(recipe: Recipe, device: Device, flops: float) -> DeviceForecast | None:
    """Plan a recipe by built-in dimensions and lengths alone; None where there are none of them."""
    known = built_in(recipe)
    if known is None:
        return None
    workload = workload_of(recipe, known[0], known[1])
    return forecast_device(THIS_MACHINE, recipe, workload, device, flops)


def _largest_format(workload: Workload, device: Device) -> dict[str, Any] | None:
    """Return the first weight format that fits of bf16, int8 and nf4."""
    budget = planner.memory_budget(workload, device)
    for quantize in ("none", "int8", "nf4"):
        weights = WeightFormat("bf16", quantize)
        peak = planner.least_memory(replace(workload, weights=weights), device)
        if peak <= budget:
            name = "bf16" if quantize == "none" else quantize
            return {"format": name, "peak_memory_bytes": peak}
    return None


# --- dry run ----------------------------------------------------------------------------------


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
    warning: Message | None = None  # about the rows

    def as_json(self) -> dict[str, Any]:
        """Return the object that `train --dry-run --json` prints."""
        changed = {"recipe": self.recipe.model_dump(), "coverage": self.coverage.as_json()}
        if self.warning:
            changed |= messages_as_json(warning=self.warning)
        return {"schema": 1, **asdict(self), **changed}


def dry_run(recipe: Recipe) -> DryRun:
    """Read and tokenize the rows as a run would, and plan its steps; load no weights.

    Raises:
        UserError: the model or the rows can't be used, or don't fit together.
    """
    base = files.resolve_model(recipe.model, weights=False)
    rows = prepare_rows(recipe.data, loading.load_tokenizer(base, recipe.data.chat_template))
    warning = positions.check_longest_row(base, rows.longest)
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
        coverage=workload.dims.coverage(
            recipe.lora.rank, recipe.lora.target_modules, recipe.quantize
        ),
        warning=warning,
    )
