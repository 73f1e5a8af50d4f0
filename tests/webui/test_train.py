"""The train tab: the form, its previews and its exports."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from jetson_ft import recipe as recipes
from jetson_ft.errors import Message, UserError
from jetson_ft.runs import store
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, render
from jetson_ft.webui.tabs import train


@pytest.fixture
def form(tmp_path: Path) -> Any:
    return train.Form(Locale("zh_CN"), tmp_path)


def values(**changed: Any) -> list[Any]:
    shown = train._form_values(recipes.load_recipe("quickstart-zh"))
    return [{**shown, **changed}[key] for key in train._ORDER]


def test_mistakes_are_shown_at_their_fields_in_the_pages_language(form: Any) -> None:
    outcome, *marks = form.plan(*values(**{"lora.rank": "x", "lora.dropout": "2"}))
    assert "请修改标出的字段" in outcome
    wrong = [mark["info"] for mark in marks if mark["elem_classes"] == ["mistake"]]
    assert wrong == [
        '⚠ `lora.rank`：必须是整数，不能是 "x"',
        "⚠ `lora.dropout`：必须小于 1，现在是 2",
    ]


def test_a_run_that_can_not_start_shows_its_error(form: Any, tmp_path: Path) -> None:
    outcome, started, ticket, *_ = form.start("t", "", *values(**{"data.train": "none.jsonl"}))
    assert "没有这个数据文件。" in outcome and "位置：" in outcome and "none.jsonl" in outcome
    assert "办法：" in outcome and "`data.train` 可以是" in outcome
    assert (started, ticket) == ("", "t") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stdout", "text"),
    [
        (json.dumps({"error": UserError("Out of memory.", "<x>").as_json()}),
         "内存不足。\n  位置：    &lt;x&gt;"),
        ("", "Killed"), ("{}", "Killed"), ("[]", "Killed"), ("oops", "Killed"),
    ],
)  # fmt: skip
def test_a_failed_dry_run_shows_its_error_in_the_pages_language(
    stdout: str, text: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 2, stdout, "Killed\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    outcome, *_ = form.plan(*values())
    assert outcome == f'<div class="complaint" role="alert">{text}</div>'


def test_a_data_file_with_a_dash_first_is_no_option(form: Any) -> None:
    outcome, *_ = form.inspect(*values(**{"data.train": "--help"}))
    assert "没有这个数据文件。" in outcome and "--help" in outcome


def test_an_upload_that_can_not_be_stored_raises(form: Any, tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("")
    with pytest.raises(gr.Error, match="需要文件夹的位置上是一个文件"):
        form.store_upload(str(tmp_path / "rows.jsonl"))


def test_the_exported_command_and_recipe_equal_the_form(tmp_path: Path) -> None:
    form = train.Form(Locale("en"), tmp_path)
    command, yaml = form.export(
        "quickstart-zh", *values(**{"lora.rank": "4", "data.train": "a b.json"})
    )
    arguments = shlex.split(command.replace("\\\n", ""))
    assert arguments[:3] == ["jetson-ft", "train", "quickstart-zh"]
    sets = [word for word in arguments[3:] if word != "--set"]
    # Named, as the default would follow the rank.
    alpha = f"lora.alpha={recipes.load_recipe('quickstart-zh').lora.alpha}"
    assert set(sets) == {"lora.rank=4", alpha, "data.train=a b.json", f"output_dir={tmp_path}"}
    assert recipes.load_recipe("quickstart-zh", sets) == recipes.parse_recipe(yaml)
    assert form.export("quickstart-zh", *values(**{"lora.rank": "x"}))[0] == form.t(train._MISTAKES)


@pytest.mark.parametrize(
    "text",
    ["a.json, b c.jsonl", "a.json\nb c.jsonl\n", "a.json，b c.jsonl", "[a.json, b c.jsonl]"],
)
def test_several_sources_are_written_with_commas_or_a_line_each(tmp_path: Path, text: str) -> None:
    form = train.Form(Locale("en"), tmp_path)
    command, yaml = form.export("quickstart-zh", *values(**{"data.train": text}))
    assert recipes.parse_recipe(yaml).data.train == ["a.json", "b c.jsonl"]
    assert "--set 'data.train=[a.json, b c.jsonl]'" in command


def test_sources_with_shares_fill_the_form_and_are_read_back(tmp_path: Path) -> None:
    form = train.Form(Locale("en"), tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  train:\n  - 'a, b.json'\n  - {source: c, share: 0.5}\n")
    _outcome, *fields = form.load(str(path))
    text = fields[train._ORDER.index("data.train")]["value"]
    assert text == "['a, b.json', {source: c, share: 0.5}]"
    _command, yaml = form.export("quickstart-zh", *values(**{"data.train": text}))
    assert recipes.parse_recipe(yaml).data.train == recipes.load_recipe(path).data.train


def test_a_mistake_in_a_list_of_sources_is_shown_at_the_field(form: Any) -> None:
    _outcome, *fields = form.plan(*values(**{"data.train": "[a, {source: b, share: 2}]"}))
    info = fields[train._ORDER.index("data.train")]["info"]
    assert info.startswith("⚠ `data.train[1].share`：")


def test_a_file_whose_name_has_a_comma_is_one_source(tmp_path: Path) -> None:
    (tmp_path / "a, b.json").touch()
    form = train.Form(Locale("en"), tmp_path)
    path = str(tmp_path / "a, b.json")
    _command, yaml = form.export("quickstart-zh", *values(**{"data.train": path}))
    assert recipes.parse_recipe(yaml).data.train == path


def test_an_inspection_of_several_sources_tells_the_part_of_each(tmp_path: Path, form: Any) -> None:
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(4)]
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(rows[: 3 if name == "a.json" else 4]))
    text = f"[{tmp_path}/a.json, {{source: {tmp_path}/b.json, rows: 4}}]"
    outcome, *_ = form.inspect(*values(**{"data.train": text}))
    assert f"{tmp_path}/a.json：读取 3 条，使用 3 条" in outcome
    assert f"{tmp_path}/b.json：读取 4 条，使用 1 条" in outcome
    assert "略去：3 条与前面来源重复的数据" in outcome


def test_an_uploaded_recipe_fills_the_form(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nlora:\n  rank: 3\n")
    outcome, *fields = form.load(str(path))
    assert outcome == "" and fields[train._ORDER.index("lora.rank")]["value"] == "3"
    path.write_text("version: 1\nlora:\n  rnak: 3\n")
    outcome, *fields = form.load(str(path))
    assert "lora.rank" in outcome and all(field == gr.skip() for field in fields)


def test_an_address_with_copy_fills_the_form(tmp_path: Path) -> None:
    form = train.Form(Locale("en"), tmp_path)
    run = store.create_run(
        recipes.load_recipe("quickstart-zh", ["lora.rank=5", f"output_dir={tmp_path}"]), "x"
    )
    run.write_state("finished")

    def open_address(query: str) -> Any:
        scope = {"type": "http", "query_string": query.encode(), "headers": []}
        return form.open_address(gr.Request(Request(scope)))

    outcome, tabs, *fields = open_address(f"copy={run.name}")
    assert run.name in outcome and tabs.selected == "train"
    assert fields[train._ORDER.index("lora.rank")]["value"] == "5"
    assert "no run" in open_address("copy=../x")[0] or "name" in open_address("copy=../x")[0]
    assert open_address(f"run={run.name}")[1].selected == "runs"
    assert open_address("")[1] == gr.skip()


def test_an_inspection_marks_the_trained_text() -> None:
    result = {
        "sources": [{"name": "a.json", "read": {
            "rows_read": 3, "rows_kept": 2, "layout": "alpaca", "encoding": "utf-8",
            "duplicates": 0,
            "dropped": {"no answer": {"count": 1, "where": ["line 2"],
                                      "message": Message("no answer").as_json(),
                                      "places": [Message("line {line}", {"line": 2}).as_json()]}},
        }}],
        "tokens": {"tokens": 50, "supervised_tokens": 20, "tokens_per_character": 1.5,
                   "truncated": 0, "lengths": {"p50": 10, "p90": 20, "p99": 30, "max": 31}},
        "max_length": 1024, "previews": [[["<b>question", False], ["answer", True]]],
    }  # fmt: skip
    html = render("inspection.jinja", Locale("en"), **result)
    assert '<pre class="tokens">&lt;b&gt;question<mark>answer</mark></pre>' in html
    assert "2 of 3 rows" in html and "no answer (line 2)" in html
    assert "<b>" not in html
    assert "没有回答（第 2 行）" in render("inspection.jinja", Locale("zh_CN"), **result)
