"""Recipes that are refused before a run's folder is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.data import store
from jetson_ft.errors import UserError
from jetson_ft.files import DiskFull
from jetson_ft.models import loading
from jetson_ft.recipe import Recipe
from jetson_ft.runs.manager import check_recipe, launch
from jetson_ft.runs.processes import DistributedConfig

ROW = {"instruction": "你好", "output": "你好！"}


def recipe(**changes: Any) -> Recipe:
    data = {key: value for key, value in changes.items() if key != "model"}
    return Recipe.model_validate({"model": changes.get("model", "embedded"), "data": data})


def rows(path: Path, *lines: Any) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "phi"}')
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def test_rows_longer_than_the_position_table_are_refused(tmp_path: Path, short_gpt2: Path) -> None:
    long = {"instruction": "你好", "output": "好" * 60}
    name = rows(tmp_path / "a.jsonl", *[{**ROW, "output": str(n)} for n in range(200)], long)
    check_recipe(recipe(model=str(short_gpt2), train=name, heldout=1, max_length=64))
    with pytest.raises(UserError, match="reads 64 tokens at most"):
        check_recipe(recipe(model=str(short_gpt2), train=name, heldout=1, max_length=65))


def test_rows_within_the_position_table_pass_with_any_length(
    tmp_path: Path, short_gpt2: Path
) -> None:
    name = rows(tmp_path / "a.jsonl", *[{**ROW, "output": str(n)} for n in range(9)])
    check_recipe(recipe(model=str(short_gpt2), train=name, heldout=1))


def test_the_models_config_is_loaded_once(
    tmp_path: Path, short_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = loading.load_config
    monkeypatch.setattr(
        loading, "load_config", lambda base: (loaded.append(base.name), load(base))[1]
    )
    name = rows(tmp_path / "a.jsonl", {**ROW, "output": "好" * 60}, ROW)
    with pytest.raises(UserError, match="reads 64 tokens at most"):
        check_recipe(recipe(model=str(short_gpt2), train=name, heldout=1))
    assert loaded == [str(short_gpt2)]


@pytest.fixture
def whole_reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the sources that were read whole."""
    names: list[str] = []
    read = store.read_source
    monkeypatch.setattr(
        store,
        "read_source",
        lambda source, **more: (names.append(source.name), read(source, **more))[1],
    )
    return names


def test_usable_first_rows_pass_without_reading_the_whole_source(
    tmp_path: Path, model_folder: Path, whole_reading: list[str]
) -> None:
    check_recipe(Recipe())
    name = rows(tmp_path / "a.jsonl", "{broken", {"x": 1}, ROW)
    check_recipe(recipe(model=str(model_folder), train=name, heldout=name))
    check_recipe(recipe(train=name, heldout=5))
    assert whole_reading == []


@pytest.mark.parametrize("key", ["train", "heldout"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Data file not found"),
        ("", "0 rows"),
        ("[]", "0 rows"),
        ('{"x": 1}', "no known layout"),
        ('{"instruction": "a", "output": ""}', "can't be used"),
        ("{\n", "can't be used"),
        ("\0\1\2", "encoding"),
    ],
)
def test_data_without_usable_rows_is_refused(
    key: str, content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        check_recipe(recipe(**{key: str(path)}))
    assert str(path) in str(caught.value.where)
    assert str(caught.value.fix)


def test_rows_of_another_layout_than_the_recipes_are_refused(tmp_path: Path) -> None:
    name = rows(tmp_path / "a.jsonl", ROW)
    check_recipe(recipe(train=name, format="alpaca"))
    with pytest.raises(UserError, match="can't be used"):
        check_recipe(recipe(train=name, format="sharegpt"))


def test_the_recipes_encoding_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROW, ensure_ascii=False).encode("utf-16-le"))
    check_recipe(recipe(train=str(path), encoding="utf-16-le"))
    with pytest.raises(UserError, match="encoding"):
        check_recipe(recipe(train=str(path)))


def test_the_recipes_columns_are_used_where_the_rows_have_them(tmp_path: Path) -> None:
    train = rows(tmp_path / "a.jsonl", {"title": "q", "body": "a"})
    heldout = rows(tmp_path / "b.jsonl", ROW)
    columns = {"question": "title", "answer": "body"}
    check_recipe(recipe(train=train, heldout=heldout, columns=columns))
    with pytest.raises(UserError, match="no known layout"):
        check_recipe(recipe(train=train))
    with pytest.raises(UserError, match="no column `title`"):
        check_recipe(recipe(train=heldout, columns=columns))


def test_a_missing_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Model not found"):
        check_recipe(recipe(model=str(tmp_path / "gone")))


def test_a_folder_without_weights_is_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        check_recipe(recipe(model=str(model_folder)))


def test_a_model_on_a_hub_out_of_reach_is_refused() -> None:
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE|out of reach"):
        check_recipe(recipe(model="owner/name"))


def test_a_data_set_on_a_hub_out_of_reach_is_refused() -> None:
    with pytest.raises(UserError, match="'owner/name' can't be downloaded"):
        check_recipe(recipe(train="owner/name"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "Chat template not found"), ("{{ messages }", "not valid Jinja: line 1")],
)
def test_a_wrong_chat_template_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jinja"
    if content:
        file.write_text(content)
    unusable = recipe(chat_template=str(file))
    unusable.output_dir = str(tmp_path / "runs")
    with pytest.raises(UserError, match=words):
        launch(unusable, "x")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "t5 is an encoder-decoder"),
        ({"model_type": "qwen2_vl"}, "qwen2_vl is a multimodal model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"model_type": "from-tomorrow"}, "has no architecture"),
        ({"model_type": "llama", "hidden_size": "wide"}, "can't be loaded"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    config: dict[str, Any], words: str, model_folder: Path, tmp_path: Path
) -> None:
    (model_folder / "config.json").write_text(json.dumps(config))
    unusable = recipe(model=str(model_folder), train=rows(tmp_path / "a.jsonl", ROW))
    unusable.output_dir = str(tmp_path / "runs")
    with pytest.raises(UserError, match=words):
        launch(unusable, "x")
    assert not (tmp_path / "runs").exists()


def test_a_folder_named_like_a_known_model_is_checked_by_its_own_config(
    tiny_model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model_of("Qwen/Qwen3-0.6B"), tmp_path / "microsoft" / "phi-1_5")
    monkeypatch.chdir(tmp_path)
    named = recipe(model="microsoft/phi-1_5")
    named.lora.target_modules = ["o_proj"]  # Phi-1.5 has `dense`
    check_recipe(named)


@pytest.mark.parametrize("model", ["embedded", "folder"])
def test_a_wrong_target_module_is_refused_with_the_models_names(
    model: str, model_folder: Path, tmp_path: Path
) -> None:
    name = model if model == "embedded" else str(model_folder)
    unusable = recipe(model=name, train=rows(tmp_path / "a.jsonl", ROW))
    unusable.lora.target_modules = ["q_porj"]
    unusable.output_dir = str(tmp_path / "runs")
    with pytest.raises(UserError, match="no linear layer named q_porj") as caught:
        launch(unusable, "x")
    assert "Did you mean q_proj? It has: " in str(caught.value.fix)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("node_rank", [0, 1])
def test_only_machine_0_needs_space_for_checkpoints(
    node_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
    config = DistributedConfig(nnodes=2, node_rank=node_rank, rendezvous="10.0.0.1:29500")
    with nullcontext() if node_rank else pytest.raises(DiskFull):
        launch(Recipe(output_dir=str(tmp_path)), "pair", config, start=lambda _run, _lock: None)
