"""What is shown before anything is trained is what training will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.runs.preview import dry_run, inspect, pieces
from jetson_ft.runs.rundir import Run


def test_a_dry_run_counts_what_the_run_then_makes(finished: Run) -> None:
    found = dry_run(finished.recipe())
    report = json.loads((finished.path / "report.json").read_text())
    assert found.steps == report["train"]["steps"]
    assert found.tokens == report["train"]["tokens"]
    assert found.rows_per_step == pytest.approx(report["train"]["rows"] / found.steps)
    assert found.rows["sha256"] == report["data_sha256"]


def test_a_row_is_shown_as_the_model_sees_it(finished: Run, tiny_phi: Path) -> None:
    from jetson_ft.models import load
    from jetson_ft.models.resolve import Base

    tokenizer = load.load_tokenizer(Base("tiny", tiny_phi))
    shown = pieces(
        tokenizer,
        [
            {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"},
            {"role": "user", "content": "再问"}, {"role": "assistant", "content": "再答"},
        ],
    )  # fmt: skip
    learnt = [text for text, is_learnt in shown if is_learnt]
    assert learnt == ["答<|endoftext|>", "再答<|endoftext|>"]
    assert [is_learnt for _, is_learnt in shown] == [False, True] * 2 + [False]
    whole = "".join(text for text, _ in shown)
    assert whole.startswith("Human:\n问") and "再问" in whole


def inspected(path: Path, model: Path, **options: Any) -> Any:
    return inspect(str(path), str(model), **options)


def test_inspecting_spreads_its_samples(rows_file: Path, tiny_phi: Path) -> None:
    found = inspected(rows_file, tiny_phi, samples=4)
    assert found.read["rows_read"] == 40 and found.tokens["rows"] == 40
    shown = ["".join(text for text, _ in row) for row in found.previews]
    assert [text.split("题")[0].rsplit("第")[1] for text in shown] == ["0", "10", "20", "30"]


@pytest.mark.parametrize(("samples", "shown"), [(0, 0), (99, 40)])
def test_more_samples_than_rows_are_all_rows(
    rows_file: Path, tiny_phi: Path, samples: int, shown: int
) -> None:
    assert len(inspected(rows_file, tiny_phi, samples=samples).previews) == shown


def test_inspecting_counts_unusable_rows_and_refuses_none(tmp_path: Path, tiny_phi: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{broken\n{"instruction": "c"}\n')
    found = inspected(path, tiny_phi)
    assert sum(entry["count"] for entry in found.read["dropped"].values()) == 2
    assert len(found.previews) == 1


def test_nothing_usable_is_said(tmp_path: Path, tiny_phi: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(UserError):
        inspected(path, tiny_phi)
