"""How the shipped recipes fit on this machine: an estimate that reads no file and loads no torch.

It takes a tenth of a second for all of them. `forecast` makes the plan that a run follows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from jetson_ft import recipe as recipes
from jetson_ft.hardware import detect
from jetson_ft.hardware.boards import BOARD_CLASSES
from jetson_ft.hardware.detect import Device
from jetson_ft.recipe import Recipe
from jetson_ft.runs.forecast import forecast_built_in
from jetson_ft.runs.preview import missing_downloads

TIGHT = 0.85  # share of the free memory above which a plan is called tight


@dataclass(frozen=True)
class RecipeFit:
    """An estimate for one recipe."""

    verdict: Literal["fits", "tight", "too_large"]
    peak_memory_bytes: int
    memory_bytes: int  # free for a run
    seconds: float | None  # with loading and comparison; None: this machine's speed is unknown
    needs_download: bool  # of the model or the rows

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate_fits() -> dict[str, RecipeFit]:
    """Return the estimate of every shipped recipe by its name."""
    device = detect.estimate_device()
    fits = {}
    for name in recipes.shipped():
        recipe = recipes.load_recipe(name)
        fits[name] = _estimate(recipe, device)
    return {name: fit for name, fit in fits.items() if fit}


def _estimate(recipe: Recipe, device: Device) -> RecipeFit | None:
    """Return the estimate; None for a model or rows of which nothing is built in."""
    flops = _flops(device, device.precision(recipe.precision))
    forecast = forecast_built_in(recipe, device, flops or 1.0)
    if forecast is None:
        return None
    plan, free = forecast.plan, forecast.memory_bytes
    peak = forecast.peak_memory_bytes
    verdict: Literal["fits", "tight"] = "fits" if peak < TIGHT * free else "tight"
    seconds = (plan.seconds or 0) + (plan.other_seconds or 0) if plan and flops else None
    return RecipeFit(
        verdict=verdict if plan else "too_large",
        peak_memory_bytes=peak,
        memory_bytes=free,
        seconds=seconds,
        needs_download=bool(missing_downloads(recipe)),
    )


def _flops(device: Device, precision: str) -> float | None:
    """Return FLOP/s of matrix products; None: unknown.

    They are those that a run or a plan measured here; before the first, a board's are those of the
    slowest module with as much memory.
    """
    if measured := detect.remembered_flops(device.kind, precision):
        return measured
    sizes = [gib for gib in BOARD_CLASSES if gib * 2**30 >= device.memory_total]
    if device.kind != "cuda" or not device.integrated or not sizes:
        return None
    return BOARD_CLASSES[min(sizes)].flops(precision)
