"""A run's GGUF export measured by llama.cpp, and GGUF files of other kinds."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import save_tiny_model
from tiny_gguf import write_gguf
from typer.testing import CliRunner
from workbench import Workbench

from jetson_ft.cli.app import app
from jetson_ft.errors import UserError
from jetson_ft.export import gguf
from jetson_ft.files import read_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs.evaluate import evaluate_model
from jetson_ft.runs.exports import exported_run, make_export
from jetson_ft.runs.store import Run


def ignore(*_call: Any) -> None:
    """Show no progress."""


def hide_llama(patch: pytest.MonkeyPatch) -> None:
    """Hide the package xllamacpp."""
    find = importlib.util.find_spec
    patch.setattr(
        importlib.util, "find_spec",
        lambda name, *rest: None if name == "xllamacpp" else find(name, *rest),
    )  # fmt: skip


@pytest.mark.slow(minutes=0.8)
@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_an_export_is_measured_as_its_run_was(kind: str, rows_file: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", kind)
    bench = Workbench(model, rows_file, tmp_path / "runs")
    run = bench.run("tiny")
    assert bench.work(run, ALL_PROBES="1") == 0, (run.path / "log.txt").read_text()
    report = run.report()["eval"]
    (folder,) = make_export(run, "gguf", check=False)
    (file,) = folder.glob("*.gguf")
    output = tmp_path / "result.json"
    command = ["eval", str(file), "--output", str(output)]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "measured by llama.cpp in xllamacpp" in shown.output
    result: Any = read_json(output)
    measured = result["eval"]
    assert measured["rows"] == report["rows"] == 5
    bits, expected = (one["bits_per_char"] for one in (measured["before"], report["after"]))
    assert bits == pytest.approx(expected, rel=5e-3)
    assert bits != pytest.approx(report["before"]["bits_per_char"], rel=5e-3)
    answers, theirs = measured["probes"], report["probes"]
    assert answers["count"] == theirs["count"] == 66
    assert len({*answers["before"]["correct"]} ^ {*theirs["after"]["correct"]}) <= 3
    with pytest.MonkeyPatch.context() as patch:
        hide_llama(patch)
        if kind == "phi":
            with pytest.raises(UserError, match=r'phi2(.|\n)*pip install "jetson-ft\[export\]"'):
                evaluate_model(Recipe(model=str(file)), None, None, ignore)
    assert measured["before"]["samples"][0]["messages"] == report["after"]["samples"][0]["messages"]


def test_without_llama_cpp_transformers_reads_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_llama(monkeypatch)
    file, rows = write_gguf(tmp_path / "tiny.gguf", context=512), tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "x", "output": "y"}\n')
    result = evaluate_model(Recipe(model=str(file)), None, str(rows), ignore)
    assert "transformers" in result["reader"] and "llama.cpp is not installed" in result["reader"]


def test_a_file_of_no_run_is_read_with_its_own_tokenizer(tmp_path: Path) -> None:
    file, rows = write_gguf(tmp_path / "tiny.gguf", context=512), tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "x", "output": "yes"}\n')
    result = evaluate_model(Recipe(model=str(file)), None, str(rows), ignore)
    assert "llama.cpp" in result["reader"] and result["eval"]["before"]["bits_per_char"] > 0
    small = write_gguf(tmp_path / "small.gguf", context=20)
    with pytest.raises(UserError, match="reads 20 tokens at most"):
        evaluate_model(Recipe(model=str(small)), None, str(rows), ignore)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:9])
    with pytest.raises(UserError, match=r"no export of a run(.|\n)*What works"):
        evaluate_model(Recipe(model=str(broken)), None, str(rows), ignore)


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "phi")
    gguf.convert_model(folder, tmp_path / "phi.gguf", "f16")
    with pytest.raises(UserError, match=r"no export of a run(.|\n)*What works"):
        evaluate_model(Recipe(model=str(tmp_path / "phi.gguf")), None, None, ignore)


def test_a_merged_export_is_measured_on_the_rows_of_its_run(finished: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(finished.path, tmp_path / finished.name)))
    (folder,) = make_export(run, "merged", check=False)
    result = evaluate_model(Recipe(model=str(folder), precision="fp32"), None, None, ignore)
    report = run.report()["eval"]
    assert result["eval"]["rows"] == report["rows"] == 5
    bits = result["eval"]["before"]["bits_per_char"]
    assert bits == pytest.approx(report["after"]["bits_per_char"], rel=5e-3)
    assert "transformers" in result["reader"] and "llama.cpp" not in result["reader"]
    elsewhere = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert exported_run(folder) is not None and exported_run(elsewhere) is None
