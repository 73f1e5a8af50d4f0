"""Forecasts from built-in figures or from files, with their sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jetson_ft.errors import UserError
from jetson_ft.hardware.boards import BOARDS
from jetson_ft.recipe import Recipe, load_recipe
from jetson_ft.runs.forecast import THIS_MACHINE, forecast_recipe


def test_built_in_model_and_rows_need_no_file() -> None:
    forecast = forecast_recipe(load_recipe("phi-1_5-zh"), "agx-orin-64gb")
    (board,) = forecast.devices
    assert board.plan and not board.plan.checkpointing and not board.is_this_machine
    assert all("no file was read" in source for source in forecast.sources)
    assert json.loads(json.dumps(forecast.as_json()))["devices"][0]["fits"]


def test_held_out_rows_are_not_trained_on() -> None:
    def seconds(*sets: str) -> float:
        (board,) = forecast_recipe(load_recipe("phi-1_5-zh", sets), "agx-orin-64gb").devices
        assert board.plan and board.plan.seconds
        return board.plan.seconds

    half = seconds("data.heldout=25500", "train.eval_every=1000000")
    assert half < seconds("train.eval_every=1000000")
    assert (
        forecast_recipe(load_recipe("quickstart-zh", ["data.heldout=10"]), "orin-nx-16gb")
        .devices[0]
        .plan
    )


def test_other_model_and_rows_are_planned_from_their_files(rows_file: Path, tiny_phi: Path) -> None:
    recipe = Recipe.model_validate({"model": str(tiny_phi), "data": {"train": str(rows_file)}})
    forecast = forecast_recipe(recipe)
    assert [device.name for device in forecast.devices] == [THIS_MACHINE, *BOARDS]
    assert forecast.devices[0].plan
    assert forecast.sources[1].startswith("rows: 36 read from ")


def test_missing_rows_are_refused_with_the_built_in_ones_named() -> None:
    with pytest.raises(UserError) as refusal:
        forecast_recipe(load_recipe("phi-1_5-zh", ["data.train=gone.json"]), "orin-nx-16gb")
    assert "llamafactory/alpaca_zh with microsoft/phi-1_5" in str(refusal.value.fix)
