"""Forecasts from built-in figures or from files, with their sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jetson_ft import hub
from jetson_ft import recipe as recipes
from jetson_ft.errors import Message, UserError
from jetson_ft.hardware.boards import BOARDS
from jetson_ft.models import catalog
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import Recipe, load_recipe
from jetson_ft.runs.forecast import THIS_MACHINE, dry_run, forecast_models, forecast_recipe


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


@pytest.mark.parametrize("model", ["microsoft/phi-1_5", "folder"])
def test_wrong_chat_template_is_refused_before_planning(
    model: str, rows_file: Path, tiny_phi: Path
) -> None:
    recipe = load_recipe("phi-1_5-zh", ["data.chat_template=gone.jinja"])
    if model == "folder":
        recipe.model, recipe.data.train = str(tiny_phi), str(rows_file)
    with pytest.raises(UserError, match="Chat template not found") as refusal:
        forecast_recipe(recipe, "orin-nx-16gb")
    assert "Planned without their file" not in str(refusal.value.fix)


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
    assert "Planned without their file: llamafactory/alpaca_zh, bundled, bundled-short" in str(
        refusal.value.fix
    )


# --- models known by name ---------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(hub, "reachable", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("data", ["bundled", "llamafactory/alpaca_zh"])
@pytest.mark.parametrize("name", sorted(set(catalog.MODELS) - {"embedded"}))
def test_known_model_is_planned_without_files_or_network(name: str, data: str) -> None:
    recipe = Recipe.model_validate({"model": name, "data": {"train": data}})
    forecast = forecast_recipe(recipe, "agx-orin-64gb")
    assert forecast.devices[0].fits
    assert forecast.sources[0] == f"model: built-in dimensions of {name}; no file was read"
    assert forecast.sources[1].startswith(f"rows: built-in lengths of {data}")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_shipped_recipe_is_planned_without_a_network(name: str) -> None:
    assert forecast_recipe(load_recipe(name), "agx-orin-64gb").devices[0].fits


def test_rows_are_counted_where_the_known_model_has_its_tokenizer_here(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cached_folder", lambda *_: tiny_llama)
    forecast = forecast_recipe(Recipe(model="Qwen/Qwen3-0.6B"), "orin-nx-16gb")
    assert forecast.sources == [
        "model: built-in dimensions of Qwen/Qwen3-0.6B; no file was read",
        "rows: 690 read from bundled and tokenized",
    ]


@pytest.fixture
def phi_named_as_known(tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a known model, which is a folder with another model here."""
    name = "microsoft/phi-1_5"
    shutil.copytree(tiny_phi, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("train", ["bundled", "rows"])
def test_local_folder_named_like_a_known_model_is_planned_from_its_files(
    phi_named_as_known: str, rows_file: Path, train: str
) -> None:
    data = {"train": str(rows_file) if train == "rows" else train}
    recipe = Recipe.model_validate({"model": phi_named_as_known, "data": data})
    sources = forecast_recipe(recipe, "orin-nx-16gb").sources
    assert sources[0] == f"model: config of {phi_named_as_known}; no weights were read"
    assert sources[1].endswith(" and tokenized")
    hidden = catalog.model_dims(BaseModelFiles(phi_named_as_known, Path(phi_named_as_known))).hidden
    assert hidden == json.loads(Path(phi_named_as_known, "config.json").read_text())["hidden_size"]


def test_damaged_local_folder_is_not_replaced_by_the_model_of_that_name_in_the_cache(
    phi_named_as_known: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cached_folder", lambda *_: tiny_llama)
    Path(phi_named_as_known, "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        forecast_recipe(Recipe(model=phi_named_as_known), "orin-nx-16gb")


def test_lengths_of_other_rows_are_estimated_where_no_tokenizer_is_here(rows_file: Path) -> None:
    recipe = Recipe.model_validate(
        {"model": "Qwen/Qwen3-0.6B", "data": {"train": str(rows_file)}, "train": {"epochs": 1}}
    )
    forecast = forecast_recipe(recipe, "orin-nx-16gb")
    assert forecast.devices[0].plan and forecast.devices[0].plan.seconds
    assert forecast.sources[1] == (
        f"rows: 40 read from {rows_file}; tokens estimated from characters (within 20%): no "
        "tokenizer here"
    )


@pytest.mark.parametrize(
    ("model", "accuracy"),
    [
        ("Qwen/Qwen3-0.6B", "within 20%"),
        ("google/gemma-3-270m", "not checked for a vocabulary of 262,144"),
        ("Qwen/Qwen3.5-0.8B", "not checked for a vocabulary of 248,320"),
    ],
)
@pytest.mark.parametrize("train", ["llamafactory/alpaca_zh", None], ids=["converted", "estimated"])
def test_estimates_for_vocabularies_that_were_not_counted_are_not_called_near(
    model: str, accuracy: str, train: str | None, rows_file: Path
) -> None:
    recipe = Recipe.model_validate({"model": model, "data": {"train": train or str(rows_file)}})
    assert f"({accuracy})" in forecast_recipe(recipe, "orin-nx-16gb").sources[1]


def test_lengths_of_several_sources_are_read_and_not_the_built_in_ones(
    rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "corpus.txt").write_text("江面很宽，船很慢。" * 500)
    train = ["bundled", {"source": str(rows_file), "share": 0.5}, str(tmp_path / "corpus.txt")]
    recipe = Recipe.model_validate({"model": "Qwen/Qwen3-0.6B", "data": {"train": train}})
    forecast = forecast_recipe(recipe, "orin-nx-16gb")
    assert forecast.devices[0].plan and forecast.devices[0].plan.seconds
    assert forecast.sources[1].startswith(
        f"rows: 731 read from bundled, {rows_file} (share 0.5), {tmp_path / 'corpus.txt'}; tokens"
    )


def test_config_alone_is_enough_for_a_model_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr(hub, "cached_folder", lambda *_: tmp_path)  # without its other files
    forecast = forecast_recipe(Recipe(model="o/gpt2"), "orin-nx-16gb")
    assert forecast.devices[0].fits
    assert forecast.sources == [
        "model: config of o/gpt2; no weights were read",
        "rows: built-in lengths of bundled for another tokenizer, converted (within 20%)",
    ]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen3-0.6B", "Did you mean `Qwen/Qwen3-0.6B`? "),
        ("qwen/qwen3-4b-x", "Qwen/Qwen3-4B"),
        ("x/y", ""),
    ],
)
def test_unknown_model_is_refused_with_the_nearest_and_the_list(name: str, near: str) -> None:
    with pytest.raises(UserError) as refusal:
        forecast_recipe(Recipe(model=name), "orin-nx-16gb")
    fix = str(refusal.value.fix)
    assert near in fix and ("Did you mean" in fix) == bool(near)
    assert "`jetson-ft models` lists the models" in fix


def test_each_known_model_fits_a_larger_board_with_no_smaller_format() -> None:
    job, forecasts = forecast_models()
    assert job.lora.rank == 16 and [one.name for one in forecasts] == list(catalog.MODELS)
    order = {"bf16": 0, "int8": 1, "nf4": 2, None: 3}
    for forecast in forecasts:
        formats = [order[fit["format"] if fit else None] for fit in forecast.fits.values()]
        assert list(forecast.fits) == [8, 16, 32, 64] and formats == sorted(formats, reverse=True)
        assert formats[-1] == 0
    largest = {one.name: one.fits for one in forecasts}
    assert largest["Qwen/Qwen3-0.6B"][8] and largest["Qwen/Qwen3-0.6B"][8]["format"] == "bf16"
    assert largest["Qwen/Qwen3-8B"][8] is None


# --- positions ---------------------------------------------------------------------------------


def long_rows(folder: Path) -> str:
    rows = [{"instruction": str(n), "output": "好" * (n + 20)} for n in range(30)]
    (folder / "long.json").write_text(json.dumps(rows))
    return str(folder / "long.json")


@pytest.mark.parametrize("forecast", [dry_run, forecast_recipe])
def test_rows_longer_than_the_position_table_are_refused(
    forecast: Any, tmp_path: Path, short_gpt2: Path
) -> None:
    data = {"train": long_rows(tmp_path), "max_length": 65}
    recipe = Recipe.model_validate({"model": str(short_gpt2), "data": data})
    with pytest.raises(UserError, match="reads 64 tokens at most, and the longest row has 65"):
        forecast(recipe)
    recipe.data.max_length = 64
    assert forecast(recipe)


def test_rows_longer_than_the_learned_positions_are_warned_about(
    tmp_path: Path, tiny_phi: Path
) -> None:
    model = tmp_path / "phi"
    shutil.copytree(tiny_phi, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    data = {"train": long_rows(tmp_path), "max_length": 100}
    result = dry_run(Recipe.model_validate({"model": str(model), "data": data}))
    assert "has 100 tokens; the model has learned 64 positions" in str(result.warning)
    shown = json.loads(json.dumps(result.as_json()))
    assert shown["warning"] == str(result.warning)
    assert Message.from_json(shown["messages"]["warning"]) == result.warning
    data["max_length"] = 64
    result = dry_run(Recipe.model_validate({"model": str(model), "data": data}))
    assert result.warning is None and result.as_json()["warning"] is None
