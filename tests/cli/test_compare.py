"""`jetson-ft compare` and the tables of `eval`, on finished runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jetson_ft.cli.compare import compare
from jetson_ft.cli.evaluate import print_figures
from jetson_ft.runs.store import Run


def test_comparison_is_printed_and_written(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / name)
    page, text = tmp_path / "c.html", tmp_path / "c.md"
    compare(["one", "two"], html=page, markdown=text, runs=tmp_path)
    printed = capsys.readouterr().out
    assert "Held-out rows" in printed and "General questions" in printed and "1. 第" in printed
    assert f"written: {page}" in printed
    compare(["one", "two"], as_json=True, runs=tmp_path)
    assert json.loads(capsys.readouterr().out)["names"] == ["one", "two"]
    assert "<h2>Held-out rows</h2>" in page.read_text() and "## Training" in text.read_text()


def test_figures_have_differences_probes_and_speed(
    finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    print_figures(finished.report())
    printed = capsys.readouterr().out
    assert "difference (95 % interval)" in printed and "no clear difference" in printed
    assert "General questions: " in printed and "replies of the adapter: " in printed
