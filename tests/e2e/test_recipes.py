"""Every shipped recipe through the real command line, with a small model in place of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from program import main_in_fork

from jetson_ft import recipe


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`jetson-ft …` in a process of its own."""
    command = [sys.executable, "-m", "jetson_ft.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


RECIPES = {name: recipe.load_recipe(name) for name in sorted(recipe.shipped())}
# Those for the quickstart's and the example's model. Each of the others is for an architecture.
FIRST = [name for name, one in RECIPES.items() if one.model in ("embedded", "microsoft/phi-1_5")]


def flags(model: Path, rows_file: Path) -> list[str]:
    """Settings with which a recipe trains a small model for two steps."""
    sets = {
        "model": str(model),
        "train.max_steps": "2",
        "train.tokens_per_step": "512",
        "train.learning_rate": "1e-2",  # two steps teach more than bf16 rounds away
        "train.warmup_steps": "0",
        "data.heldout": "4",
        "eval.max_new_tokens": "4",
        "data.train": str(rows_file),
    }
    return [flag for key, value in sets.items() for flag in ("--set", f"{key}={value}")]


def assert_trained(runs: Path, quantize: str) -> None:
    (run,) = runs.iterdir()
    report = json.loads((run / "report.json").read_text())
    assert report["train"]["steps"] == 2
    assert report["precision"].startswith(quantize if quantize != "none" else "")
    assert report["eval"]["rows"] == 4
    assert report["eval"]["after"]["loss"] < report["eval"]["before"]["loss"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_shipped_recipe_trains_in_processes_of_its_own(
    wide_phi: Path, rows_file: Path, tmp_path: Path
) -> None:
    """As the others do below without the imports; `test_embedded` does so with quantized models."""
    done = run_cli("train", "quickstart-zh", *flags(wide_phi, rows_file), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_trained(tmp_path / "runs", "none")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in FIRST)) for name in RECIPES]
)
def test_recipe_trains_a_small_model_of_its_architecture(
    name: str, wide_phi: Path, tiny_model_of: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    output, runs = tmp_path / "output", tmp_path / "runs"
    model = wide_phi if name in FIRST else tiny_model_of(RECIPES[name].model)
    arguments = ["train", name, "--foreground", "--set", f"output_dir={runs}"]
    arguments += flags(model, rows_file)
    process = forked.context().Process(target=main_in_fork, args=(arguments, str(output)))
    process.start()
    process.join(120)
    assert process.exitcode == 0, output.read_text()
    assert_trained(runs, RECIPES[name].quantize)


def test_every_key_a_shipped_recipe_sets_is_commented() -> None:
    for path in recipe.shipped().values():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ")
        for number, line in enumerate(lines):
            is_setting = (
                line.rstrip() and not line.lstrip().startswith("#") and not line.endswith(":")
            )
            previous = lines[number - 1].strip()
            # Keys right below each other share the comment above the first.
            assert not is_setting or previous.startswith("#") or ":" in previous, f"{path}: {line}"


@pytest.mark.slow
def test_dry_run_shows_recipe_rows_and_steps_and_makes_nothing(
    tiny_phi: Path, rows_file: Path, tmp_path: Path
) -> None:
    done = run_cli(
        "train", "quickstart-zh", "--dry-run", "--set", f"model={tiny_phi}",
        "--set", f"data.train={rows_file}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "36 rows" in done.stdout
    assert "held out:  4 rows" in done.stdout
    assert "steps:" in done.stdout
    assert list(tmp_path.iterdir()) == []
