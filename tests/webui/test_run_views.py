"""The views of runs, and the table of all runs, without a server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from run_folders import copy_finished, make_run
from starlette.testclient import TestClient

from jetson_ft.errors import Message, UserError
from jetson_ft.events import Warned
from jetson_ft.runs import manager, monitor
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run
from jetson_ft.webui import api
from jetson_ft.webui.render import Locale
from jetson_ft.webui.run_table import render_table
from jetson_ft.webui.run_views import render_view

NAMES = ("20260101-000000-first", "20260102-000000-second", "20260103-000000-third")


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Return two finished runs, the second with rank 8, and a stopped one of other settings."""
    first, second = copy_finished(tmp_path, NAMES[0]), copy_finished(tmp_path, NAMES[1])
    for run in (first, second):
        (run.path / "about.json").unlink()
    edit_recipe(second, "rank: 2", "rank: 8")
    return [first, second, make_run(tmp_path, NAMES[2], "stopped")]


def view(runs: list[Run], name: str, language: str = "en", **query: str) -> str:
    """Return a view, or the table, with single spaces."""
    t = Locale(language)
    if name == "table":
        html = render_table(t, [(run, monitor.summarize(run)) for run in runs], query)
    else:
        html = render_view(t, runs, name, query).replace("<wbr>", "")
    return " ".join(html.split())


def edit_recipe(run: Run, old: str, new: str) -> None:
    path = run.path / "recipe.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit_report(run: Run, change: Any) -> None:
    path = run.path / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def with_samples(count: int) -> Any:
    """Return what gives a report so many samples; every second one has the base's reply."""

    def change(report: dict[str, Any]) -> None:
        for side in ("before", "after"):
            report["eval"][side]["samples"] = [
                {
                    "messages": [{"role": "user", "content": f"prompt {number}."}],
                    "reference": f"given {number}",
                    "reply": f"{side if number % 2 else 'same'} {number}",
                    "ended": number != 3 or side == "before",
                }
                for number in range(count)
            ]

    return change


# --- samples ---------------------------------------------------------------------------------


def test_samples_are_paged_filtered_and_compared(runs: list[Run]) -> None:
    first, second, unfinished = runs
    edit_report(first, with_samples(25))
    html = view([first], "samples")
    assert html.count('<li class="sample">') == 10 and "Page 1 of 3" in html
    assert "prompt 9." in html and "prompt 10." not in html
    assert html.count("cut off") == 1 and "Prompts: 25 of 25" in html
    last = view([first], "samples", page="99")
    assert "prompt 24." in last and last.count('<li class="sample">') == 5
    assert "Prompts: 1 of 25" in view([first], "samples", text="GIVEN 17")
    differ = view([first], "samples", differ="1")
    assert "Prompts: 12 of 25" in differ and "<p>same" not in differ
    assert "No prompt matches." in view([first], "samples", text="nowhere")

    edit_report(second, with_samples(3))
    both = view([first, second, unfinished], "samples", text="prompt 1.")
    assert [*re.findall(r'class="reply (\w+)"', both)] == ["base", "tuned", "tuned"]
    assert "first" in both and "second" in both
    assert "问题：25 / 25 个" in view([first], "samples", "zh_CN")


@pytest.mark.parametrize("page", ["", "0", "-1", "x", "9" * 30, "²"])
def test_any_page_number_is_taken(runs: list[Run], page: str) -> None:
    assert "16加16" in view(runs[:1], "samples", page=page)


def test_a_run_without_samples_explains_it(runs: list[Run]) -> None:
    first, _second, unfinished = runs
    assert "After training, base and adapter answer" in view([unfinished], "samples")
    edit_report(first, with_samples(0))
    assert "kept no samples" in view([first], "samples")
    edit_report(first, lambda report: report.update(eval=None, comparison_error="no memory"))
    assert "failed: no memory" in view([first], "samples")


def test_samples_are_escaped_and_damaged_ones_are_named(runs: list[Run]) -> None:
    first = runs[0]

    def set_reply(value: Any) -> Any:
        return lambda report: report["eval"]["after"]["samples"][0].update(reply=value)

    edit_report(first, set_reply("<script>alert(1)</script>\x1b"))
    html = view([first], "samples")
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b" in html
    edit_report(first, lambda report: report["eval"]["after"]["samples"][0].pop("reply"))
    assert "report.json is damaged: its samples can" in view([first], "samples")


# --- settings --------------------------------------------------------------------------------


def test_settings_show_what_differs_from_the_defaults(runs: list[Run]) -> None:
    html = view(runs[:1], "settings")
    rank = html.partition("<code>lora.rank</code>")[2].partition("</tr>")[0]
    assert "<td>2 " in rank and "changed" in rank and "default 16" in rank
    alpha = html.partition("<code>lora.alpha</code>")[2].partition("</tr>")[0]
    assert "4" in alpha and "changed" not in alpha  # it follows the rank
    only = view(runs[:1], "settings", only="1")
    assert "lora.rank" in only and "lora.alpha" not in only and "output_dir" not in html
    assert "No differences." in view(runs[2:], "settings", only="1")


def test_settings_of_several_runs_are_side_by_side(runs: list[Run]) -> None:
    html = view(runs[:2], "settings")
    assert '<th scope="col">first</th><th scope="col">second</th>' in html
    rank = html.partition("<code>lora.rank</code>")[2].partition("</tr>")[0]
    assert re.findall(r"<td>(.*?)</td>", rank) == ["2", "8"] and "changed" not in html
    only = view(runs[:2], "settings", only="1")
    assert re.findall(r"<code>(.*?)</code>", only) == ["lora.rank"]
    (runs[1].path / "recipe.yaml").write_text("rank: [")
    assert "second" not in view(runs[:2], "settings")
    (runs[0].path / "recipe.yaml").write_text("rank: [")
    assert 'class="complaint"' in view(runs[:2], "settings")


# --- log -------------------------------------------------------------------------------------


def test_log_has_its_end_a_search_and_folded_warnings(runs: list[Run]) -> None:
    run = runs[2]
    EventLog(run, 1).emit(Warned.of_message(Message("of the run <b>")))
    lines = [f"line {number}" for number in range(9000)]
    (run.path / "log.txt").write_text("\n".join([*lines, "W x: twice", "W x: twice", "<i>end"]))
    html = view([run], "log")
    assert "&lt;i&gt;end" in html and "<i>" not in html and "line 0\n" not in html
    assert "Warnings: 2" in html and "<li>of the run &lt;b&gt;</li><li>W x: twice</li>" in html
    assert "Earlier lines" in html and f'href="/runs/{run.name}/log.txt" download' in html
    assert html.count("line ") < view([run], "log", more="1").count("line ")
    shown = view([run], "log", text="LINE 12")
    assert "Matching lines: 111" in shown and "<mark>line 12</mark>99" in shown
    many = view([run], "log", text="line")
    assert "Matching lines: 9,000, the last 500 are shown" in many
    assert "<mark>&lt;I&gt;</mark>end".lower() in view([run], "log", text="<I>")
    assert "No line matches." in view([run], "log", text="nowhere")
    assert "<mark>&lt;i&gt;</mark>end" in view([run], "log", text="\n<i> ")
    (run.path / "log.txt").unlink()
    assert "The log is empty." in view([run], "log")


def test_finished_run_shows_the_warnings_of_its_report(runs: list[Run]) -> None:
    text = Message("of all attempts").as_json()
    warnings = [{"message": "of all attempts", "text": text}, {"message": "x", "text": "damaged"}]
    edit_report(runs[0], lambda report: report.update(warnings=warnings))
    (runs[0].path / "log.txt").write_text("a line\n")
    assert "<li>of all attempts</li></ul>" in view(runs[:1], "log")


# --- table -----------------------------------------------------------------------------------


def names(html: str) -> list[str]:
    return re.findall(r'data-choose="(.*?)"', html)


def test_table_sorts_and_marks_what_differs(runs: list[Run]) -> None:
    edit_report(runs[0], lambda report: report["eval"]["after"].update(loss=1.0))
    html = view(runs, "table")
    assert names(html) == list(NAMES) and "Runs: 3" in html
    assert '<td class="better">1.000</td>' in html and html.count('class="better"') < 5
    assert '<td class="differs">8</td>' in html and '<td class="">2</td>' in html
    up, down = (view(runs, "table", sort="lora.rank", down=down) for down in ("", "1"))
    assert names(up) == list(NAMES) and names(down) == list(reversed(NAMES))
    assert 'aria-sort="ascending"' in up and 'aria-sort="descending"' in down
    unknown_last = view(runs, "table", sort="chrf", down="1")
    assert names(unknown_last)[-1] == NAMES[2]
    assert names(view(runs, "table", sort="title", down="1")) == [NAMES[2], NAMES[1], NAMES[0]]
    assert names(view(runs, "table", sort="__class__", down="x")) == list(NAMES)


def test_table_compares_finished_runs_only(runs: list[Run]) -> None:
    ticked = "/".join((NAMES[0], NAMES[2]))
    assert "compare.html" not in view(runs, "table", compared=ticked)
    html = view(runs, "table", compared="/".join(NAMES))
    assert f'"/runs/compare.html?run={NAMES[0]}&amp;run={NAMES[1]}"' in html
    assert html.count(" checked") == 3


def test_table_follows_a_changed_run_and_survives_damage(runs: list[Run]) -> None:
    view(runs, "table")
    manager.set_title_and_notes(runs[2], "<b>better name")
    (runs[0].path / "report.json").write_text("{")
    (runs[1].path / "recipe.yaml").write_text("[")
    html = view(runs, "table")
    assert "&lt;b&gt;better name" in html and names(html) == list(NAMES)


# --- routes ----------------------------------------------------------------------------------


@pytest.fixture
def page(runs: list[Run]) -> TestClient:
    app = FastAPI()
    app.include_router(api.router(runs[0].path.parent))
    app.add_exception_handler(UserError, api.error_response)
    return TestClient(app)


def test_whole_log_is_downloaded(page: TestClient, runs: list[Run]) -> None:
    content = b"\x00line\r\n" * 300_000
    (runs[0].path / "log.txt").write_bytes(content)
    answer = page.get(f"/runs/{NAMES[0]}/log.txt")
    assert answer.content == content and answer.headers["content-type"].startswith("text/plain")
    assert "attachment" in answer.headers["content-disposition"]
    (runs[0].path / "log.txt").unlink()
    assert page.get(f"/runs/{NAMES[0]}/log.txt").status_code == 422


@pytest.mark.slow(minutes=0.2)
def test_comparison_is_what_the_command_writes(page: TestClient, runs: list[Run]) -> None:
    address = f"?run={NAMES[0]}&run={NAMES[1]}"
    html = page.get(f"/runs/compare.html{address}")
    assert "<h2>Settings that differ</h2>" in html.text and "lora.rank" in html.text
    markdown = page.get(f"/runs/compare.md{address}")
    assert markdown.text.startswith("# first and second")
    refused = page.get(f"/runs/compare.md?run={NAMES[0]}&run={NAMES[2]}")
    assert refused.status_code == 422 and "has no report yet" in refused.json()["what"]
    assert page.get("/runs/compare.html?run=../x&run=latest").status_code == 422
