"""Plans of the page: without torch, as the command line's."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from jetson_ft import hub
from jetson_ft.errors import UserError
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.recipe import Recipe, load_recipe
from jetson_ft.runs import preview
from jetson_ft.runs.forecast import forecast_recipe
from jetson_ft.runs.preview import Machine, RecipeFacts

GIB = 2**30
DEVICE = Device("cpu", "x", None, 4, 16 * GIB, 8 * GIB, False, True)
MACHINE = Machine(DEVICE, {"bf16": 4e11, "fp32": 1e11})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this machine `DEVICE`."""
    for name in ("detect_cpu", "detect_device", "estimate_device"):
        monkeypatch.setattr(detect, name, lambda: DEVICE)
    monkeypatch.setattr(detect, "measure_flops", lambda _kind, name: MACHINE.flops[name])
    monkeypatch.setattr("jetson_ft.training.memory.with_own_memory", lambda device: device)


@pytest.mark.parametrize("name", ["quickstart-zh", "phi-1_5-zh-quick", "phi-1_5-zh-qlora"])
def test_plan_of_a_shipped_recipe_is_that_of_the_command_line(name: str, here: None) -> None:
    recipe = load_recipe(name)
    facts = preview.known_facts(recipe)
    assert facts
    plan = preview.plan_recipe(recipe, facts, MACHINE)
    assert plan.forecast == forecast_recipe(recipe).devices[0]
    assert plan.limit_bytes == int(DEVICE.memory_available * 0.95) and not plan.limit_is_set


def test_plan_needs_neither_torch_nor_the_rows(tmp_path: Path) -> None:
    code = (
        "import sys; from jetson_ft.runs import preview; from jetson_ft.recipe import load_recipe;"
        "from jetson_ft.hardware.detect import detect_cpu;"
        "recipe = load_recipe('phi-1_5-zh-quick');"
        "machine = preview.Machine(detect_cpu(), {'bf16': 1e11, 'fp32': 1e11});"
        "plan = preview.plan_recipe(recipe, preview.known_facts(recipe), machine);"
        "print(plan.rows, {'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == "50940 set()\n"


def test_recipes_limit_is_the_limit(here: None) -> None:
    recipe = load_recipe("quickstart-zh", ["train.max_memory_gb=0.5"])
    facts = preview.known_facts(recipe)
    assert facts
    plan = preview.plan_recipe(recipe, facts, MACHINE)
    assert plan.limit_bytes == 5 * 10**8 and plan.limit_is_set
    assert plan.forecast.plan is None and plan.forecast.peak_memory_bytes > plan.limit_bytes
    with pytest.raises(UserError, match=r"its limit is 0\.47 GiB"):
        preview.require_fit(recipe, facts, MACHINE)


def test_memory_that_is_free_is_read_for_each_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    now = replace(DEVICE, memory_available=GIB // 2)
    monkeypatch.setattr(detect, "detect_cpu", lambda: now)
    recipe = load_recipe("quickstart-zh")
    facts = preview.known_facts(recipe)
    assert facts and preview.plan_recipe(recipe, facts, MACHINE).forecast.plan is None


def test_target_modules_that_match_nothing_are_refused(here: None) -> None:
    recipe = load_recipe("quickstart-zh", ["lora.target_modules=nope"])
    facts = preview.known_facts(recipe)
    assert facts
    with pytest.raises(UserError, match="nope"):
        preview.plan_recipe(recipe, facts, MACHINE)


def own_recipe(path: Path, model: Path | str, **data: Any) -> Recipe:
    return Recipe.model_validate({"model": str(model), "data": {"train": str(path), **data}})


def read(recipe: Recipe) -> RecipeFacts:
    """Return the facts as they come through JSON from the process."""
    result = json.loads(json.dumps(asdict(preview.read_facts(recipe))))
    return TypeAdapter(RecipeFacts).validate_python(result)


def test_facts_of_own_rows_and_model(rows_file: Path, tiny_phi: Path, here: None) -> None:
    recipe = own_recipe(rows_file, tiny_phi)
    assert preview.known_facts(recipe) is None
    facts = read(recipe)
    assert facts.inspection and len(facts.inspection["conversations"]) == preview.SAMPLES
    assert len(facts.inspection["previews"]) == preview.SAMPLES and not facts.is_estimate
    plan = preview.plan_recipe(recipe, facts, MACHINE)
    assert plan.rows + plan.heldout_rows == facts.lengths.rows == 40
    assert plan.forecast.fits


def test_long_rows_are_cut_for_the_page(tmp_path: Path, tiny_phi: Path) -> None:
    rows = [{"question": "q" * 9000, "answer": f"{n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    inspection = read(own_recipe(tmp_path / "rows.json", tiny_phi, max_length=20_000)).inspection
    assert inspection
    for conversation, row in zip(inspection["conversations"], inspection["previews"], strict=True):
        assert len(conversation[0]["content"]) == 4002
        assert sum(len(text) for text, _trained in row) == 4000


def test_rows_of_a_known_model_that_is_not_here_are_estimated(
    rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = read(own_recipe(rows_file, "microsoft/phi-1_5"))
    assert facts.is_estimate and facts.lengths.rows == 40
    assert facts.inspection and len(facts.inspection["conversations"]) == preview.SAMPLES
    assert facts.inspection["previews"] == [] and facts.inspection["tokens"] == {}


def test_broken_rows_are_refused_as_a_run_refuses_them(tmp_path: Path, tiny_phi: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{broken\n{"instruction": "c"}\n' * 2)
    recipe = own_recipe(path, tiny_phi)
    facts = read(recipe)
    with pytest.raises(UserError, match=r"4 of 6 rows can't be used") as error:
        preview.check_rows(recipe, facts)
    assert "data.on_invalid=skip" in str(error.value)
    preview.check_rows(own_recipe(path, tiny_phi, on_invalid="skip"), facts)


def test_what_is_not_on_this_machine(
    rows_file: Path, tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phi = load_recipe("phi-1_5-zh-quick")
    assert preview.missing_downloads(phi) == ["microsoft/phi-1_5", "llamafactory/alpaca_zh"]
    assert preview.missing_downloads(phi, for_facts=True) == ["llamafactory/alpaca_zh"]
    assert preview.missing_downloads(own_recipe(rows_file, tiny_phi)) == []
    own = own_recipe(rows_file, "a/b")
    assert preview.missing_downloads(own, for_facts=True) == ["a/b"]
    # Only config and tokenizer were downloaded, as for a plan.
    monkeypatch.setattr(hub, "cached_folder", lambda *_: tmp_path)
    assert preview.missing_downloads(own) == ["a/b"]
    assert preview.missing_downloads(own, for_facts=True) == []
    (tmp_path / "model.safetensors").touch()
    assert preview.missing_downloads(own) == []


def test_remembered_machine_has_no_gpu_and_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "estimate_device", lambda: DEVICE)
    rates: dict[str, float | None] = dict.fromkeys(("bf16", "fp32"), 1e11)
    monkeypatch.setattr(detect, "remembered_flops", lambda _kind, name: rates[name])
    assert preview.remembered_machine() == Machine(DEVICE, {"bf16": 1e11, "fp32": 1e11})
    rates["fp32"] = None
    assert preview.remembered_machine() is None
    rates["fp32"] = 1e11
    monkeypatch.setattr(detect, "estimate_device", lambda: replace(DEVICE, kind="cuda"))
    assert preview.remembered_machine() is None
