"""What the form says about what it was given."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from jetson_ft import recipe as recipes
from jetson_ft.runs import rundir
from jetson_ft.webui import train
from jetson_ft.webui.library import gr
from jetson_ft.webui.outlook import inspection_html
from jetson_ft.webui.words import Words


@pytest.fixture
def form(tmp_path: Path) -> Any:
    return train._Form(Words("zh"), tmp_path)


def values(**changed: Any) -> list[Any]:
    shown = train._values(recipes.load("quickstart-zh"))
    return [{**shown, **changed}[key] for key in train._ORDER]


def test_mistakes_stand_at_their_fields_in_the_pages_language(form: Any) -> None:
    outcome, *marks = form.check("", *values(**{"lora.rank": "x", "lora.dropout": "2"}))
    assert "请修改标出的字段" in outcome
    wrong = [mark["info"] for mark in marks if mark["elem_classes"] == ["mistake"]]
    assert wrong == [
        '⚠ `lora.rank`：必须是整数，不能是 "x"',
        "⚠ `lora.dropout`：必须小于 1，现在是 2",
    ]


def test_a_run_that_can_not_start_says_why(form: Any, tmp_path: Path) -> None:
    outcome, started, ticket, *_ = form.start("t", "", *values(**{"data.train": "none.jsonl"}))
    assert "没有这个数据文件。\n位置：none.jsonl\n办法：`data.train` 可以是" in outcome
    assert (started, ticket) == ("", "t") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stdout", "told"),
    [
        (json.dumps({"error": {"what": "Out of memory.", "where": "<x>", "fix": ""}}),
         "内存不足。\n位置：&lt;x&gt;"),
        ("", "Killed"), ("{}", "Killed"), ("[]", "Killed"), ("oops", "Killed"),
    ],
)  # fmt: skip
def test_a_dry_run_that_fails_is_told_in_the_pages_language(
    stdout: str, told: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 2, stdout, "Killed\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    outcome, *_ = form.check("", *values())
    assert outcome == f'<div class="complaint" role="alert">{told}</div>'


def test_an_upload_that_can_not_be_kept_says_why(form: Any, tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("")
    with pytest.raises(gr.Error, match="需要文件夹的位置上是一个文件"):
        form.take_rows(str(tmp_path / "rows.jsonl"))


def test_the_form_can_be_taken_along_as_a_command_and_as_a_recipe(tmp_path: Path) -> None:
    form = train._Form(Words("en"), tmp_path)
    command, yaml = form.same(
        "quickstart-zh", *values(**{"lora.rank": "4", "data.train": "a b.json"})
    )
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["jetson-ft", "train", "quickstart-zh"]
    sets = [word for word in words[3:] if word != "--set"]
    alpha = (
        f"lora.alpha={recipes.load('quickstart-zh').lora.alpha}"  # else it would follow the rank
    )
    assert set(sets) == {"lora.rank=4", alpha, "data.train=a b.json", f"output={tmp_path}"}
    assert recipes.load("quickstart-zh", sets) == recipes.parse(yaml)
    assert form.same("quickstart-zh", *values(**{"lora.rank": "x"}))[0] == form.words(
        "train.mistakes"
    )


def test_a_recipe_of_ones_own_fills_the_form(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nlora:\n  rank: 3\n")
    said, *fields = form.take_recipe(str(path))
    assert said == "" and fields[train._ORDER.index("lora.rank")]["value"] == "3"
    path.write_text("version: 1\nlora:\n  rnak: 3\n")
    said, *fields = form.take_recipe(str(path))
    assert "lora.rank" in said and all(field == gr.skip() for field in fields)


def test_an_address_leads_to_a_runs_settings(tmp_path: Path) -> None:
    form = train._Form(Words("en"), tmp_path)
    run = rundir.create(recipes.load("quickstart-zh", ["lora.rank=5", f"output={tmp_path}"]), "x")
    run.write_state("finished")

    def arrive(query: str) -> Any:
        scope = {"type": "http", "query_string": query.encode(), "headers": []}
        return form.arrive(gr.Request(Request(scope)))

    said, tabs, *fields = arrive(f"copy={run.name}")
    assert run.name in said and tabs.selected == "train"
    assert fields[train._ORDER.index("lora.rank")]["value"] == "5"
    assert "no run" in arrive("copy=../x")[0] or "name" in arrive("copy=../x")[0]
    assert arrive(f"run={run.name}")[1].selected == "runs"
    assert arrive("")[1] == gr.skip()


def test_rows_are_shown_as_the_model_reads_them() -> None:
    found = {
        "read": {"rows_read": 3, "rows_kept": 2, "layout": "alpaca", "encoding": "utf-8",
                 "duplicates": 0,
                 "dropped": {"no answer": {"count": 1, "where": ["line 2"]}}},
        "tokens": {"tokens": 50, "supervised_tokens": 20, "tokens_per_character": 1.5,
                   "truncated": 0, "lengths": {"p50": 10, "p90": 20, "p99": 30, "max": 31}},
        "max_length": 1024, "previews": [[["<b>question", False], ["answer", True]]],
    }  # fmt: skip
    html = inspection_html(found, Words("en"))
    assert "<pre class='tokens'>&lt;b&gt;question<mark>answer</mark></pre>" in html
    assert "2 of 3 rows" in html and "no answer (line 2)" in html
    assert "<b>" not in html
