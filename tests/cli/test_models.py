"""`jetson-ft models`, and `jetson-ft plan --model`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from program import Done, assert_refused, invoke
from typer.testing import CliRunner

from jetson_ft.cli.app import app
from jetson_ft.models.catalog import MODELS
from jetson_ft.runs import manager

Jetson = Callable[..., Done]


def test_models_are_listed_with_size_licence_and_what_fits() -> None:
    heading, *lines = invoke("models").splitlines()
    assert heading.split()[-8:] == ["8", "GB", "16", "GB", "32", "GB", "64", "GB"]
    rows = {line.split()[0]: line for line in lines[: len(MODELS)]}
    assert list(rows) == list(MODELS)
    assert rows["meta-llama/Llama-3.2-1B-Instruct"].split()[1:] == [
        "1.24", "B", "2.5", "GB", "Llama", "3.2", "(gated)", "bf16", "bf16", "bf16", "bf16",
    ]  # fmt: skip
    assert "Predicted; no board has run this yet." in "\n".join(lines)


def test_models_as_json_have_numbers_and_the_job() -> None:
    printed = json.loads(invoke("models", "--json"))
    assert printed["schema"] == 1 and printed["job"]["lora"]["rank"] == 16
    (model,) = [one for one in printed["models"] if one["name"] == "Qwen/Qwen3-8B"]
    assert model["parameters"] == 8_190_735_360 and not model["gated"]
    assert model["fits"]["8"] is None
    assert model["fits"]["16"]["format"] == "nf4"
    assert 8e9 < model["fits"]["16"]["peak_memory_bytes"] < 16e9


def test_listing_models_and_planning_one_loads_no_torch() -> None:
    code = (
        "import sys; from jetson_ft.cli.app import app\n"
        "app(['models'], standalone_mode=False)\n"
        "app(['plan', '--model', 'Qwen/Qwen3-0.6B', '--device', 'orin-nx-16gb'],"
        " standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'gradio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_model_without_a_recipe_is_planned_with_the_default_settings() -> None:
    options = ("--model", "Qwen/Qwen3-1.7B", "--device", "orin-nx-16gb")
    printed = json.loads(invoke("plan", *options, "--json", "-s", "quantize=nf4"))
    (device,) = printed["devices"]
    assert device["fits"] and device["precision"] == "nf4/bf16"
    assert "built-in lengths of bundled" in printed["sources"][1]


def test_model_replaces_that_of_the_recipe() -> None:
    options = ("--model", "Qwen/Qwen3-0.6B", "--device", "orin-nx-16gb")
    output = invoke("plan", "phi-1_5-zh", *options)
    assert "built-in dimensions of Qwen/Qwen3-0.6B" in output
    assert "built-in lengths of llamafactory/alpaca_zh for another tokenizer" in output


def test_unknown_model_is_refused_with_the_nearest_name(jetson: Jetson) -> None:
    assert_refused(
        jetson("plan", "--model", "Qwen3-0.6B"),
        "Did you mean `Qwen/Qwen3-0.6B`?",
        "jetson-ft models",
    )


def test_plan_without_recipe_and_model_takes_the_recipe_of_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manager.default_recipe, "__defaults__", (lambda: True, lambda: True))
    done = CliRunner().invoke(app, ["plan", "--device", "orin-nx-16gb", "--json"])
    assert not done.exit_code
    assert "phi-1_5-zh-quick (a CUDA GPU and the hub in reach" in done.stderr
    assert "built-in dimensions of microsoft/phi-1_5" in json.loads(done.stdout)["sources"][0]
