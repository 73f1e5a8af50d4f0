"""Forecasts from built-in figures or from files, with their sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jetson_ft.errors import UserError
from jetson_ft.hardware.boards import BOARDS
from jetson_ft.recipe import Recipe, load_recipe
from jetson_ft.runs.forecast import THIS_MACHINE, dry_run, forecast_recipe


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


def test_share_of_adapted_and_quantized_parameters_is_part_of_it() -> None:
    sets = ["quantize=nf4", "lora.target_modules=q_proj,v_proj"]
    coverage = forecast_recipe(load_recipe("phi-1_5-zh", sets), "orin-nx-16gb").as_json()[
        "coverage"
    ]
    parameters = 1_418_270_720
    assert coverage == {
        "parameters": parameters,
        "adapter_parameters": 16 * 2 * 24 * (2048 + 2048),
        "adapted_share": 2 * 24 * 2048**2 / parameters,
        "quantized_share": 1_207_959_552 / parameters,
        "notes": [],
    }


@pytest.mark.parametrize("board", ["orin-nx-16gb", None])
def test_wrong_target_module_is_refused_before_planning(
    board: str | None, rows_file: Path, tiny_phi: Path
) -> None:
    recipe = load_recipe("phi-1_5-zh", ["lora.target_modules=[c_attn]"])
    if board is None:
        recipe.model, recipe.data.train, recipe.data.heldout = str(tiny_phi), str(rows_file), 5
    with pytest.raises(UserError, match="no linear layer named c_attn"):
        forecast_recipe(recipe, board)


def test_tokenizer_larger_than_the_embedding_is_refused(
    rows_file: Path, tiny_phi: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_phi, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 250}))
    recipe = Recipe.model_validate({"model": str(model), "data": {"train": str(rows_file)}})
    with pytest.raises(UserError, match="has 259 tokens, but the model's embedding only 250 rows"):
        dry_run(recipe)


def test_missing_rows_are_refused_with_the_built_in_ones_named() -> None:
    with pytest.raises(UserError) as refusal:
        forecast_recipe(load_recipe("phi-1_5-zh", ["data.train=gone.json"]), "orin-nx-16gb")
    assert "llamafactory/alpaca_zh with microsoft/phi-1_5" in str(refusal.value.fix)
