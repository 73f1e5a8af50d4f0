"""What the page shows of a recipe before it starts: its rows, and its plan for this machine.

The page loads no torch. A child process (`main`) reads the rows and the model's config, another
measures the machine; from these, plans are computed without torch in milliseconds, for whatever the
settings of LoRA, training and memory are.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from jetson_ft import hub
from jetson_ft.adapter import check_target_modules
from jetson_ft.child_process import end_with_parent
from jetson_ft.data import sources
from jetson_ft.data.lengths import LengthHistogram
from jetson_ft.data.report import ReadReport, check_dropped
from jetson_ft.errors import UserError
from jetson_ft.files import expand_user
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.models import catalog, files
from jetson_ft.models.dims import ModelDims
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import weight_format
from jetson_ft.recipe import Recipe, parse_recipe
from jetson_ft.runs import forecast
from jetson_ft.runs.forecast import THIS_MACHINE, DeviceForecast
from jetson_ft.runs.inspection import inspect_data, inspect_without_tokenizer
from jetson_ft.training import cost_model, planner

SAMPLES = 25  # rows to look at
_SHOWN_CHARACTERS = 4_000  # of a message, and of a row as tokens
_PRECISIONS = "bf16", "fp32"  # fp16 is as fast as bf16 where it is of use


@dataclass(frozen=True)
class Machine:
    """This machine, and its rate for matrix products."""

    device: Device
    flops: dict[str, float]  # FLOP/s by precision

    def with_free_memory(self) -> Device:
        """Return the device with the memory that is free now."""
        now = detect.detect_cpu() if self.device.shares_memory else detect.estimate_device()
        return replace(self.device, memory_available=now.memory_available)


@dataclass(frozen=True)
class RecipeFacts:
    """What a plan needs of a recipe's model and rows, and what was read for it."""

    dims: ModelDims
    lengths: LengthHistogram  # of all usable rows
    is_estimate: bool  # the lengths are
    inspection: dict[str, Any] | None = None  # `inspection.Inspection`; None: no row was read


@dataclass(frozen=True)
class RecipePlan:
    """The plan for this machine, with what the page shows of it."""

    forecast: DeviceForecast
    limit_bytes: int  # that the run may take
    limit_is_set: bool  # by the recipe, else by what is free
    rows: int
    heldout_rows: int
    tokens: int  # to train on, over all passes
    steps: int
    load_seconds: float  # of `plan.other_seconds`
    is_estimate: bool


def known_facts(recipe: Recipe) -> RecipeFacts | None:
    """Return the facts that are known without reading a file; None: files must be read."""
    known = forecast.built_in(recipe)
    return RecipeFacts(known[0], known[1], is_estimate=not known[2]) if known else None


def missing_downloads(recipe: Recipe, for_facts: bool = False) -> list[str]:
    """Return the names of the recipe's model and data sets that are not on this machine yet.

    Args:
        for_facts: as far as the facts need them: not the model's weights, and nothing of a model
            whose dimensions are built in.
    """
    model = recipe.model
    if not for_facts:
        is_here = files.has_weights_here(model)
    else:
        is_here = (
            catalog.known_dims(model) is not None
            or not files.is_hub_id(model)
            or hub.cached_folder(model, "model") is not None
        )
    missing = [] if is_here else [model]
    for item in recipe.data.sources():
        repo = "/".join(item.source.split("/")[:2])
        is_local = item.source in sources.BUNDLED or expand_user(item.source).exists()
        if not is_local and hub.REPO_ID.fullmatch(repo) and not hub.cached_folder(repo, "dataset"):
            missing.append(item.source)
    return missing


def read_facts(recipe: Recipe) -> RecipeFacts:
    """Read the recipe's rows and its model's config. Imports torch.

    Raises:
        UserError: the rows, the model or its tokenizer can't be used.
    """
    dims = catalog.known_dims(recipe.model)
    base: BaseModelFiles | None
    try:
        base = files.resolve_model(recipe.model, weights=False)
        dims = dims or catalog.model_dims(base)
    except UserError:  # of a known model on the Hub nothing is needed
        if dims is None or not files.is_hub_id(recipe.model):
            raise
        base = forecast.files_here(recipe.model)
    if base and (base.gguf_file or files.has_tokenizer(base.folder)):
        inspection = inspect_data(recipe.data, recipe.model, SAMPLES, base)
    else:
        inspection = inspect_without_tokenizer(recipe.data, recipe.model, dims.vocabulary, SAMPLES)
    is_estimate = not inspection.tokens
    return RecipeFacts(dims, inspection.histogram, is_estimate, _shortened(asdict(inspection)))


def _shortened(inspection: dict[str, Any]) -> dict[str, Any]:
    """Cut the texts of long rows, which the page keeps in its memory."""
    for message in chain(*inspection["conversations"]):
        for key in ("content", "tool_calls"):
            if len(message.get(key) or "") > _SHOWN_CHARACTERS:
                message[key] = f"{message[key][:_SHOWN_CHARACTERS]} …"
    for row in inspection["previews"]:
        left = _SHOWN_CHARACTERS
        for place, (text, is_trained) in enumerate(row):
            row[place] = text[:left], is_trained
            left = max(0, left - len(text))
    return inspection


def measure_machine() -> Machine:
    """Return this machine; its FLOP/s are measured for a moment. Imports torch."""
    device = detect.detect_device()
    return Machine(device, {name: detect.measure_flops(device.kind, name) for name in _PRECISIONS})


def remembered_machine() -> Machine | None:
    """Return this machine without torch; None if it has a GPU, or was never measured."""
    device = detect.estimate_device()
    flops = {name: detect.remembered_flops(device.kind, name) for name in _PRECISIONS}
    known = {name: rate for name, rate in flops.items() if rate}
    return Machine(device, known) if device.kind == "cpu" and len(known) == len(flops) else None


def check_rows(recipe: Recipe, facts: RecipeFacts) -> None:
    """Raise `UserError` for unusable rows, as a run would."""
    for part in (facts.inspection or {}).get("sources", []):
        check_dropped(ReadReport(**part["read"]), recipe.data.on_invalid, part["name"])


def plan_recipe(recipe: Recipe, facts: RecipeFacts, machine: Machine) -> RecipePlan:
    """Return the plan for this machine.

    Raises:
        UserError: the target modules match nothing, or the precision is not for this machine.
    """
    check_target_modules(facts.dims, recipe.lora.target_modules)
    workload, device = _workload_here(recipe, facts, machine)
    flops = machine.flops["fp32" if device.precision(recipe.precision) == "fp32" else "bf16"]
    result = forecast.forecast_device(THIS_MACHINE, recipe, workload, device, flops)
    recomputes = bool(result.plan and result.plan.checkpointing)
    tokens, steps = cost_model.predict_tokens(workload, device.kind, flops, recomputes)
    return RecipePlan(
        forecast=result,
        limit_bytes=int(planner.memory_budget(workload, device)),
        limit_is_set=recipe.train.max_memory_gb is not None,
        rows=workload.lengths.rows,
        heldout_rows=workload.heldout_rows,
        tokens=round(tokens),
        steps=steps,
        load_seconds=cost_model.predict_load_seconds(workload),
        is_estimate=facts.is_estimate,
    )


def require_fit(recipe: Recipe, facts: RecipeFacts, machine: Machine) -> None:
    """Raise the `UserError` with which a run that does not fit would end."""
    workload, device = _workload_here(recipe, facts, machine)
    planner.choose_plan(workload, device, machine.flops["fp32"])


def _workload_here(
    recipe: Recipe, facts: RecipeFacts, machine: Machine
) -> tuple[cost_model.Workload, Device]:
    """Return the recipe's workload on this machine, and the machine with its free memory."""
    device = machine.with_free_memory()
    workload = forecast.workload_of(recipe, facts.dims, facts.lengths)
    return replace(workload, weights=weight_format(recipe, device)), device


def main() -> None:
    """Print the facts of the recipe on standard input as JSON; with `machine`, this machine."""
    end_with_parent()
    gc.disable()  # a quarter of the time is spent on the objects of libraries, which all stay
    try:
        if sys.argv[1:] == ["machine"]:
            result: Any = asdict(measure_machine())
        else:
            result = asdict(read_facts(parse_recipe(sys.stdin.read())))
    except UserError as error:
        result = {"error": error.as_json()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
