"""What the form says about what it was given."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from jetson_ft import recipe
from jetson_ft.webui import train
from jetson_ft.webui.words import Words


@pytest.fixture
def form(tmp_path: Path) -> Any:
    return train._Form(Words("zh"), tmp_path)


def values(**changed: Any) -> list[Any]:
    shown = train._values(recipe.load("quickstart-zh"))
    return [{**shown, **changed}[key] for key in train._ORDER]


def test_mistakes_stand_at_their_fields_in_the_pages_language(form: Any) -> None:
    outcome, _, *marks = form.check("", *values(**{"lora.rank": "x", "lora.dropout": "2"}))
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
