"""`jetson-ft recipe …` and `jetson-ft data …`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from program import Done, invoke

from jetson_ft import recipe as recipes
from jetson_ft.cli import data
from jetson_ft.recipe import Recipe

Jetson = Callable[..., Done]


def test_shown_recipe_is_resolved_and_parses_to_the_same(jetson: Jetson) -> None:
    done = jetson("recipe", "show", "quickstart-zh", "--set", "lora.rank=8", "-s", "output_dir=x")
    assert done.returncode == 0
    shown = recipes.parse_recipe(done.stdout)
    assert (shown.lora.rank, shown.lora.alpha, shown.output_dir) == (8, 16, "x")
    assert shown == recipes.load_recipe("quickstart-zh", ["lora.rank=8", "output_dir=x"])


def test_valid_recipe_is_ok_with_its_hash() -> None:
    output = invoke("recipe", "validate", "quickstart-zh")
    assert output.startswith("ok: quickstart-zh")
    assert recipes.load_recipe("quickstart-zh").sha256()[:12] in output


def test_schema_is_json_with_every_key() -> None:
    printed = json.loads(invoke("recipe", "schema"))
    assert set(printed["properties"]) == set(Recipe.model_fields)


def test_shipped_recipes_are_listed_with_a_description() -> None:
    lines = invoke("recipe", "list").splitlines()
    assert {line.split()[0] for line in lines} == set(recipes.shipped())
    assert all(len(line.split()) > 4 for line in lines)


def test_format_option_has_the_recipes_choices() -> None:
    offered = get_type_hints(data.inspect)["layout"]
    assert offered == recipes.fields()["data.format"].annotation


def test_inspection_lists_what_is_not_read_and_reads_chosen_columns(
    jetson: Jetson, tmp_path: Path, tiny_phi: Path
) -> None:
    row = {"title": "q", "body": "a", "metadata": "x"}
    (tmp_path / "here" / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    command = "data", "inspect", "rows.jsonl", "--model", str(tiny_phi), "--samples", "0"
    columns = "--column", "question=title", "--column", "answer=body"
    done = jetson(*command, *columns)
    assert done.returncode == 0
    assert "not read:  metadata (3)\n" in done.stdout
    wrong = jetson(*command, "--column", "qestion=title")
    assert wrong.returncode == 2
    assert "did you mean `data.columns.question`?" in wrong.stderr


def test_inspection_of_several_sources_lists_the_part_of_each(
    jetson: Jetson, tmp_path: Path, tiny_phi: Path
) -> None:
    rows = [json.dumps({"question": f"q{n}", "answer": "a"}) + "\n" for n in range(4)]
    (tmp_path / "here" / "a.jsonl").write_text("".join(rows[:2]))
    (tmp_path / "here" / "b.jsonl").write_text("".join(rows))
    (tmp_path / "here" / "c.txt").write_text("江面很宽。" * 10)
    command = "data", "inspect", "--model", str(tiny_phi), "--samples", "0", "--max-length", "100"
    mapping = "{source: a.jsonl, rows: 1}"
    done = jetson(*command, "a.jsonl", "b.jsonl", "c.txt", mapping)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("source:", "split:"))]
    assert lines[0].startswith("source:    a.jsonl: 2 rows read, 2 used, ")
    assert lines[1].startswith("source:    b.jsonl: 4 rows read, 2 also in an earlier one, 2 used")
    assert lines[2] == "source:    c.txt: 1 rows read, 1 used, 151 tokens"
    assert lines[3].startswith("source:    a.jsonl: 2 rows read, 1 also in an earlier one, 0 used")
    assert lines[4] == "split:     1 documents, into rows of at most max_length"
    wrong = jetson(*command, "{source: a.jsonl, rows: 0}")
    assert "`data.train[0].rows`: must be at least 1, not 0" in wrong.stderr


def test_trained_segments_are_marked_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    data.print_segment("[x]", False)
    data.print_segment("答", True)
    assert capsys.readouterr().out == "[x]⟦答⟧"
