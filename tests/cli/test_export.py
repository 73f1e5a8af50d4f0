"""`jetson-ft export`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from program import assert_refused, invoke, main_here

from jetson_ft.runs.store import Run


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A finished run on the tiny Phi, of the test's own."""
    shutil.copytree(finished.path, tmp_path / "runs" / finished.name)
    return Run(tmp_path / "runs" / finished.name)


def test_export_prints_files_check_and_next_commands(run: Run) -> None:
    output = invoke("export", run.path, "--format", "merged")
    lines = output.splitlines()
    assert lines[0].startswith(f"{run.name}: up to 0.1 GB of disk, ")
    assert f"{run.path}/export/merged/" in lines
    assert any(line.split()[0] == "model.safetensors" and line.endswith("MB") for line in lines[1:])
    assert "5 held-out rows)" in output and "trained on the base as" not in output
    assert "  check: passed, read by transformers" in output
    assert f"Chat:    jetson-ft chat {run.path}/export/merged" in lines
    assert f"Serve:   jetson-ft serve {run.path}" in lines
    shown = invoke("runs", "show", run.path)
    assert f"export: {run.path}/export/merged (check: passed, read by transformers" in shown


def test_export_as_json_and_without_check(run: Run) -> None:
    output = invoke("export", run.path, "--no-check", "--json", "--dtype", "fp16")
    (export,) = json.loads(output)["exports"]
    assert export["path"] == f"{run.path}/export/merged"
    assert export["merge"]["dtype"] == "fp16"
    assert export["check"] == {"schema": 1, "checked": False}
    assert "check: none (--no-check)" in invoke("export", run.path, "--no-check")


def test_quantised_run_states_which_base_is_merged(run: Run) -> None:
    recipe = run.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("quantize: none", "quantize: nf4"))
    output = invoke("export", run.path)
    assert "trained on the base as nf4, merged into the unquantised one" in output


def test_refusals_are_one_message(run: Run) -> None:
    assert_refused(
        main_here("export", run.path, "--format", "onnx"),
        "can't be 'onnx'",
        "--format",
        "merged, gguf",
    )
    shutil.rmtree(run.adapter)
    assert_refused(main_here("export", run.path), "has no adapter yet (finished)")
    done = main_here("export", run.path, "--json")
    assert "has no adapter yet" in json.loads(done.stdout)["error"]["what"]
