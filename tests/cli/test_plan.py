"""`jetson-ft plan` and `jetson-ft train --dry-run`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import Done, assert_refused

from jetson_ft.cli.train import print_dry_run
from jetson_ft.hardware.boards import BOARDS
from jetson_ft.recipe import Recipe
from jetson_ft.runs.forecast import dry_run

Jetson = Callable[..., Done]


@pytest.mark.slow
def test_recipe_is_planned_for_every_module_without_weights_or_network(
    jetson: Jetson, tmp_path: Path
) -> None:
    done = jetson(
        "plan", "phi-1_5-zh", COLUMNS="80", HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in (*BOARDS, "this machine"))
    assert "built-in lengths of llamafactory/alpaca_zh, 51,000 rows" in done.stdout
    assert "no board has run this yet" in done.stdout
    assert max(map(len, lines)) <= 84 and not list((tmp_path / "here").iterdir())


def test_planning_for_a_board_loads_no_torch() -> None:
    code = (
        "import sys; from jetson_ft import cli; sys.argv[0] = 'jetson-ft'\n"
        "try: cli.main()\n"
        "finally: print(*{'torch', 'gradio', 'peft'} & set(sys.modules), file=sys.stderr)"
    )
    arguments = ["plan", "phi-1_5-zh-qlora", "--device", "orin-nx-16gb", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    (device,) = json.loads(done.stdout)["devices"]
    assert device["fits"] and device["precision"] == "nf4/bf16"
    assert device["plan"]["peak_memory_bytes"] == sum(device["plan"]["parts"].values())
    assert done.stderr.strip() == ""


def test_board_that_is_too_small_gets_settings_that_would_fit(jetson: Jetson) -> None:
    done = jetson("plan", "phi-1_5-zh", "--device", "orin-nano-8gb", "-s", "precision=fp32")
    assert done.returncode == 0
    assert "orin-nano-8gb: would fit with precision: bf16 (" in done.stdout


def test_unknown_board_is_refused_with_the_nearest_name(jetson: Jetson) -> None:
    done = jetson("plan", "phi-1_5-zh", "--device", "orin-nano")
    assert_refused(done, "Did you mean orin-nano-")


def test_dry_run_predicts_for_this_machine(rows_file: Path, tiny_phi: Path, capsys: Any) -> None:
    recipe = Recipe.model_validate({"model": str(tiny_phi), "data": {"train": str(rows_file)}})
    result = dry_run(recipe)
    assert result.forecast.is_this_machine and result.forecast.plan
    assert result.as_json()["coverage"]["adapter_parameters"] > 0
    print_dry_run(result)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "adapter parameters, on " in line]
    (line,) = [one for one in lines if "this machine" in one]
    assert line.split()[2] == "yes" and len(line.split()) > 7
