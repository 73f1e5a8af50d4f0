"""`jetson-ft recipe …` and `jetson-ft plan`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from typer import Option

from jetson_ft.cli import output
from jetson_ft.cli.output import JsonOption, RecipeArgument, SetOption
from jetson_ft.files import printable
from jetson_ft.i18n import duration

if TYPE_CHECKING:
    from jetson_ft.models.dims import Coverage
    from jetson_ft.runs.forecast import DeviceForecast

app = typer.Typer(help="Look at recipes.", no_args_is_help=True)


@app.command("list")
def list_shipped() -> None:
    """The shipped recipes, with the first line of each."""
    from jetson_ft import recipe as recipes

    for name, path in recipes.shipped().items():
        output.show(f"{name:20} {recipes.summary(path)}")


@app.command()
def show(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """The resolved recipe, every default written out."""
    from jetson_ft import recipe as recipes

    print(recipes.load_recipe(recipe, overrides or []).to_yaml(), end="")


@app.command()
def validate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Check a recipe; every mistake is shown at once, with its line."""
    from jetson_ft import recipe as recipes

    sha256 = recipes.load_recipe(recipe, overrides or []).sha256()
    output.show(f"ok: {recipe} (sha256 {sha256[:12]})")


@app.command()
def schema() -> None:
    """The JSON schema of recipes, for editors."""
    from jetson_ft import recipe as recipes

    print(recipes.json_schema(), end="")


def plan(
    recipe: Annotated[str | None, output.RECIPE] = None,
    model: Annotated[
        str | None, Option(help="Model to plan, as in `jetson-ft models`; else the recipe's.")
    ] = None,
    device: Annotated[str | None, Option(help="One module, as orin-nx-16gb; else all.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict memory and time, here and on Orin modules; load no weights."""
    from jetson_ft import recipe as recipes
    from jetson_ft.runs.forecast import forecast_recipe

    with output.json_errors(as_json):
        overrides = [*(overrides or []), *([f"model={model}"] if model is not None else [])]
        if recipe is None and model is None:
            recipe = default_recipe("choose with `jetson-ft plan NAME`", as_json)
        if recipe is not None:
            planned = recipes.load_recipe(recipe, overrides)
        else:
            planned = recipes.parse_recipe("", "", overrides)
        forecast = forecast_recipe(planned, device)
    if as_json:
        output.print_json(forecast.as_json())
        return
    print_devices(forecast.devices)
    print_coverage(forecast.coverage)
    here = [f"{d.name}: {d.device}, {d.precision}" for d in forecast.devices if d.is_this_machine]
    if any(d.memory_limited for d in forecast.devices):
        here.append("free: up to the limit of this container or service")
    disk = f"disk: {forecast.disk_bytes / 10**6:,.0f} MB for checkpoints and adapter"
    for line in [*here, disk, *forecast.sources, *forecast.assumptions]:
        output.show(f"- {line}")


def default_recipe(choose: str, as_json: bool) -> str:
    """Return the recipe that is taken where none is named; print which, why and how to choose."""
    from jetson_ft.runs import manager

    name, why = manager.default_recipe()
    file = sys.stderr if as_json else sys.stdout
    print(printable(f"recipe: {name} ({why}; {choose})"), file=file)
    return name


def print_coverage(coverage: Coverage) -> None:
    """Print how much of the model adapters and quantization apply to."""
    for message in (coverage.as_message(), *coverage.notes):
        output.show(f"- {message}")


def print_devices(devices: list[DeviceForecast]) -> None:
    """Print a row for each device, and what would make the recipe fit the others."""
    columns = ("fits", "batch", "recompute", "GiB", "free", "training", "besides")
    table = Table(
        Column("predicted for", no_wrap=True),
        *(Column(name, justify="right") for name in columns),
        box=None, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for device in devices:
        fits, batch, recompute, peak = "no", "–", "–", device.least_memory_bytes
        time = others = "–"
        if plan := device.plan:
            fits, batch = "yes", f"{plan.micro_batch_tokens:,}"
            recompute = "yes" if plan.checkpointing else "no"
            peak, time = plan.peak_memory_bytes or 0, str(duration(plan.seconds or 0))
            others = str(duration(plan.other_seconds or 0))
        table.add_row(
            device.name, fits, batch, recompute, f"{peak / 2**30:.2f}",
            f"{device.memory_bytes / 2**30:.1f}", time, others,
        )  # fmt: skip
    output.out.print(table)
    output.out.print()
    for device in devices:
        if device.plan is None:
            settings = [
                f"{entry['settings']} ({entry['peak_memory_bytes'] / 2**30:.2f} GiB)"
                for entry in device.would_fit
            ]
            would = f"would fit with {'; '.join(settings)}"
            advice = would if settings else "no setting of the recipe makes it fit"
            output.show(f"{device.name}: {advice}")
