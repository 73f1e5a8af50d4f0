"""Measuring a finished run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jetson_ft.errors import UserError
from jetson_ft.hardware.detect import Device
from jetson_ft.runs.evaluate import evaluate_model
from jetson_ft.runs.report import figures
from jetson_ft.runs.store import Run


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fp32 on any machine."""
    monkeypatch.setattr(Device, "precision", lambda self, wanted: "fp32")


def ignore(side: str, part: str, done: int, total: int) -> None:
    """Show no progress."""


def test_evaluated_again_equals_the_runs_report(finished: Run) -> None:
    report = json.loads((finished.path / "report.json").read_text())["eval"]
    again = evaluate_model(finished.recipe(), finished.adapter, None, ignore)["eval"]
    assert again["rows"] == report["rows"]
    for side in ("before", "after"):
        for key, value in report[side].items():
            expected = value if key == "samples" else pytest.approx(value, rel=1e-4)
            assert again[side][key] == expected
    assert again["probes"] == report["probes"]


def test_other_rows_are_evaluated_with_progress(finished: Run, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(
        '{"instruction": "你好", "output": "你也好"}\n' * 1
        + '{"instruction": "x", "output": "y"}\n'
    )
    calls: list[Any] = []
    result = evaluate_model(
        finished.recipe(), finished.adapter, str(path), lambda *call: calls.append(call)
    )
    assert result["eval"]["rows"] == 2
    assert result["eval"]["after"]["samples"][0]["reference"] == "你也好"
    assert {(side, part) for side, part, *_ in calls} == {
        (side, part) for side in ("before", "after") for part in ("tokens", "replies", "probes")
    }
    assert [call[2:] for call in calls if call[1] == "replies"] == [(0, 2), (2, 2)] * 2


def test_added_token_without_an_embedding_is_refused_in_the_rows_only(
    finished: Run, tmp_path: Path
) -> None:
    run = Run(Path(shutil.copytree(finished.path, tmp_path / "run")))
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(run.adapter)
    path = tmp_path / "other.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n')
    assert evaluate_model(run.recipe(), run.adapter, str(path), ignore)["eval"]["rows"] == 1
    path.write_text('{"instruction": "<new>", "output": "y"}\n')
    with pytest.raises(UserError, match=r"has 260 tokens, .* only 259 rows"):
        evaluate_model(run.recipe(), run.adapter, str(path), ignore)


def test_model_alone_has_one_side(finished: Run) -> None:
    report = json.loads((finished.path / "report.json").read_text())["eval"]
    alone = evaluate_model(finished.recipe(), None, None, ignore)
    assert alone["eval"]["before"]["loss"] == pytest.approx(report["before"]["loss"], rel=1e-4)
    assert alone["eval"]["probes"]["before"] == report["probes"]["before"]
    assert not {"after", "differences"} & set(alone["eval"]) and "after" not in alone["generation"]
    assert all("after" not in row for row in alone["rows"])
    rows = {row["key"]: row for row in figures.metric_rows(alone)}
    assert rows["bits_per_char"]["before"] and rows["bits_per_char"]["after"] == ""
    assert figures.probe_notes(alone) == []
