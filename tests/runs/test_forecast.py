"""A forecast rests on what is built in, else on the files, and says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.device.boards import BOARDS
from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe, load
from jetson_ft.runs.forecast import HERE, outlook
from jetson_ft.runs.preview import dry_run


def test_a_known_job_needs_no_file() -> None:
    found = outlook(load("phi-1_5-zh"), "agx-orin-64gb")
    (board,) = found.devices
    assert board.plan and not board.plan.checkpointing and not board.is_here
    assert all("no file was read" in source for source in found.sources)
    assert json.loads(json.dumps(found.as_json()))["devices"][0]["fits"]


def test_held_out_rows_are_not_trained_on() -> None:
    def seconds(*sets: str) -> float:
        (board,) = outlook(load("phi-1_5-zh", sets), "agx-orin-64gb").devices
        assert board.plan and board.plan.seconds
        return board.plan.seconds

    half = seconds("data.heldout=25500", "train.eval_every=1000000")
    assert half < seconds("train.eval_every=1000000")
    assert outlook(load("quickstart-zh", ["data.heldout=10"]), "orin-nx-16gb").devices[0].plan


def test_an_unknown_job_is_planned_from_its_files(rows_file: Path, tiny_phi: Path) -> None:
    recipe = Recipe.model_validate({"model": str(tiny_phi), "data": {"train": str(rows_file)}})
    found = outlook(recipe)
    assert [device.name for device in found.devices] == [HERE, *BOARDS]
    assert found.devices[0].plan
    assert found.sources[1].startswith("rows: 36 read from ")


def test_what_is_neither_known_nor_in_reach_is_told_with_what_is_known() -> None:
    with pytest.raises(UserError) as refusal:
        outlook(load("phi-1_5-zh", ["data.train=gone.json"]), "orin-nx-16gb")
    assert "llamafactory/alpaca_zh with microsoft/phi-1_5" in refusal.value.fix


def test_a_dry_run_predicts_for_this_machine(rows_file: Path, tiny_phi: Path, capsys: Any) -> None:
    from jetson_ft.console import print_dry_run

    recipe = Recipe.model_validate({"model": str(tiny_phi), "data": {"train": str(rows_file)}})
    found = dry_run(recipe)
    assert found.forecast.is_here and found.forecast.plan
    print_dry_run(found)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "predicted" in one]
    assert "GiB free; micro-batches of" in line
