"""Previews agree with the training that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.recipe import DataRecipe
from jetson_ft.runs.forecast import dry_run
from jetson_ft.runs.inspection import inspect_data, preview_segments
from jetson_ft.runs.store import Run


def test_dry_run_counts_equal_the_runs_report(finished: Run) -> None:
    preview = dry_run(finished.recipe())
    report = json.loads((finished.path / "report.json").read_text())
    assert preview.steps == report["train"]["steps"]
    assert preview.tokens == report["train"]["tokens"]
    assert preview.rows_per_step == pytest.approx(report["train"]["rows"] / preview.steps)
    assert preview.rows["sha256"] == report["data_sha256"]


def test_preview_marks_answers_as_trained(finished: Run, tiny_phi: Path) -> None:
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles

    tokenizer = loading.load_tokenizer(BaseModelFiles("tiny", tiny_phi))
    shown = preview_segments(
        tokenizer,
        [
            {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"},
            {"role": "user", "content": "再问"}, {"role": "assistant", "content": "再答"},
        ],
    )  # fmt: skip
    trained = [text for text, is_trained in shown if is_trained]
    assert trained == ["答<|endoftext|>", "再答<|endoftext|>"]
    assert [is_trained for _, is_trained in shown] == [False, True] * 2 + [False]
    whole = "".join(text for text, _ in shown)
    assert whole.startswith("Human:\n问") and "再问" in whole


def inspected(path: Path, model: Path, samples: int = 3, **settings: Any) -> Any:
    return inspect_data(DataRecipe(train=str(path), **settings), str(model), samples)


def test_inspected_samples_are_evenly_spread(rows_file: Path, tiny_phi: Path) -> None:
    preview = inspected(rows_file, tiny_phi, samples=4)
    assert preview.sources[0]["read"]["rows_read"] == 40 and preview.tokens["rows"] == 40
    shown = ["".join(text for text, _ in row) for row in preview.previews]
    assert [text.split("题")[0].rsplit("第")[1] for text in shown] == ["0", "10", "20", "30"]


@pytest.mark.parametrize(("samples", "shown"), [(0, 0), (99, 40)])
def test_more_samples_than_rows_shows_all_rows(
    rows_file: Path, tiny_phi: Path, samples: int, shown: int
) -> None:
    assert len(inspected(rows_file, tiny_phi, samples=samples).previews) == shown


def test_unusable_rows_are_counted_not_refused(tmp_path: Path, tiny_phi: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{broken\n{"instruction": "c"}\n')
    preview = inspected(path, tiny_phi)
    assert sum(entry["count"] for entry in preview.sources[0]["read"]["dropped"].values()) == 2
    assert len(preview.previews) == 1


def test_preview_of_a_document_ends_at_max_length(tmp_path: Path, tiny_phi: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    (row,) = inspected(tmp_path / "a.txt", tiny_phi, max_length=20).previews
    assert row == [("a" * 20, True)]


def test_no_usable_row_is_refused(tmp_path: Path, tiny_phi: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(UserError):
        inspected(path, tiny_phi)
