"""The Train tab's right column: the plan, remedies, the command, and Start."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from workbench import LightRuns

from jetson_ft import recipe as recipes
from jetson_ft.errors import UserError
from jetson_ft.hardware import detect
from jetson_ft.hardware.detect import Device
from jetson_ft.runs import queue, store
from jetson_ft.runs.preview import Machine
from jetson_ft.webui import previews
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.limits import BusyError
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs import train_summary
from jetson_ft.webui.tabs.train_errors import complaint
from jetson_ft.webui.tabs.train_form import FIRST, Form, form_values
from jetson_ft.webui.tabs.train_summary import Summary

PAGE = SimpleNamespace(session_hash="one")
GIB = 2**30
MACHINE = Machine(
    Device("cpu", "x", None, 4, 16 * GIB, 8 * GIB, False, True), {"bf16": 4e11, "fp32": 1e11}
)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> previews.Previews:
    """Return the previews of a measured machine, which start no process."""
    kept = previews.Previews()
    kept._machine = MACHINE
    monkeypatch.setattr(detect, "detect_cpu", lambda: MACHINE.device)
    monkeypatch.setattr(train_summary, "PREVIEWS", kept)
    monkeypatch.setattr(previews, "run_json", lambda *_, **__: pytest.fail("a process"))
    return kept


@pytest.fixture
def summary(tmp_path: Path, kept: previews.Previews) -> Summary:
    assert kept
    return Summary(Locale("en"), Form(Locale("en"), tmp_path / "runs"))


def values(name: str = FIRST, **changed: Any) -> list[Any]:
    shown = form_values(recipes.load_recipe(name)) | changed
    return [shown[key] for key in Form.ORDER]


def refuse(monkeypatch: pytest.MonkeyPatch, error: UserError) -> None:
    """Let the process that reads rows report an error."""

    def run_json(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(previews, "run_json", run_json)


# --- the plan ---------------------------------------------------------------------------------


def test_the_end_of_the_bar_is_the_limit(summary: Summary) -> None:
    html, _marks = summary.plan(PAGE, *values(**{"train.max_memory_gb": 4}))
    widths = [float(width) for width in re.findall(r'class="s\d" style="width: ([\d.]+)%', html)]
    peak = float(re.findall(r"<b>([\d.]+)</b> of 3.73 GiB", html)[0])
    assert sum(widths) == pytest.approx(100 * peak * GIB / 4e9, abs=0.5)
    assert "your limit" in html and 'class="fits"' in html
    assert "Work" in html and html.count("<dd>") == 4


@pytest.mark.parametrize(
    ("limit", "style"), [(1.5, "fits"), (1.25, "tight"), (0.9, "no"), (0.3, "no")]
)
def test_a_full_bar_is_amber_and_an_overfull_one_red_with_the_number(
    summary: Summary, limit: float, style: str
) -> None:
    html, *_ = summary.plan(PAGE, *values(**{"train.max_memory_gb": limit}))
    assert f'<section class="{style}">' in html
    assert ('<i style="width: 100%">' in html) is (style == "no")
    # What would make it fit, or that nothing does.
    assert ("data-settings" in html) is (limit == 0.9)
    assert ("No setting saves enough" in html) is (limit == 0.3)


def test_what_a_remedy_sets_fits(summary: Summary) -> None:
    html, *_ = summary.plan(PAGE, *values(**{"train.max_memory_gb": 0.9}))
    settings = re.findall(r'data-settings="([^"]+)">([^<]+)<', html)
    assert ("quantize: nf4, lora.rank: 8", "Use nf4 + rank 8") in settings
    changed = {"train.max_memory_gb": 0.9, "quantize": "nf4", "lora.rank": 8}
    html, *_ = summary.plan(PAGE, *values(**changed))
    assert 'class="no"' not in html


def test_the_phi_recipes_are_planned_without_a_network(summary: Summary) -> None:
    for name in ("phi-1_5-zh-quick", "phi-1_5-zh-qlora"):
        html, *_ = summary.plan(PAGE, *values(name))
        assert 'class="meter"' in html and "50,940" in html
        assert "Not on this machine yet: microsoft/phi-1_5, llamafactory/alpaca_zh" in html


def test_nothing_is_downloaded_for_a_plan_unless_it_is_asked_for(
    summary: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    html, *_ = summary.plan(PAGE, *values(**{"data.train": "owner/name"}))
    assert "Not on this machine yet: owner/name" in html and "data-plan" in html
    refuse(monkeypatch, UserError("The Hub is down."))
    html, *_ = summary.plan_now(PAGE, *values(**{"data.train": "owner/name"}))
    assert "The Hub is down." in html


def test_while_a_run_trains_the_plan_waits_for_a_button(
    summary: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "running_run", lambda: Path("one"))
    html, *_ = summary.plan(PAGE, *values())
    assert "data-plan" in html and "meter" not in html
    html, *_ = summary.plan_now(PAGE, *values())
    assert "meter" in html and "would wait in the queue" in html


def test_mistakes_are_marked_and_the_plan_says_that_it_waits(summary: Summary) -> None:
    for key, value in (("lora.rank", 0), ("lora.target_modules", "nope")):
        html, marks = summary.plan(PAGE, *values(**{key: value}))
        assert "once the marked fields are fixed" in html
        assert list(json.loads(marks)["mistakes"]) == [key]
    _html, marks = summary.plan(PAGE, *values())
    assert json.loads(marks)["mistakes"] == {}


def test_an_older_question_shows_nothing(summary: Summary, kept: previews.Previews) -> None:
    machine = kept.machine

    def slow() -> Machine:
        kept.next_turn(PAGE.session_hash)  # the page asks again meanwhile
        return machine()

    kept.machine = slow  # type: ignore[method-assign]
    assert summary.plan(PAGE, *values()) == [gr.skip()] * 2


# --- errors in the form's words ---------------------------------------------------------------


def test_what_a_command_sets_is_a_button_here(tmp_path: Path) -> None:
    error = UserError(
        "`data.train` has <b> rows that `x` broke.", f"{tmp_path}/uploads/0123abcd/rows.csv",
        "Leave them out with `--set data.on_invalid=skip`, or `quantize: nf4, lora.rank: 8`, "
        "never `--set output_dir=x` or `--set lora.rank`.",
    )  # fmt: skip
    html = complaint(error, Locale("en"), tmp_path)
    assert ">rows.csv<" in html and str(tmp_path) not in html and "`" not in html
    assert "&lt;b&gt;" in html and "<code>x</code>" in html
    assert re.findall(r'data-settings="([^"]+)">([^<]+)<', html) == [
        ("data.on_invalid: skip", "Skip the broken rows"),
        ("quantize: nf4, lora.rank: 8", "Use nf4 + rank 8"),
    ]


# --- the command ------------------------------------------------------------------------------


def test_the_command_follows_each_change(summary: Summary) -> None:
    html = summary.command(FIRST, *values(**{"lora.rank": 4, "data.train": "a b.json"}))
    command = re.findall(r"<code>(.+?)</code>", html, re.DOTALL)[0].replace("&#39;", "'")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["jetson-ft", "train", FIRST]
    assert "lora.rank=4" in words and "data.train=a b.json" in words
    html = summary.command(FIRST, *values(**{"lora.rank": 0}))
    assert "<code>" not in html and "data-copy" not in html


# --- start ------------------------------------------------------------------------------------


def start(summary: Summary, ticket: str = "t", **changed: Any) -> Any:
    return summary.start(PAGE, ticket, FIRST, *values(**changed))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"train.max_memory_gb": 0.9}, "its limit is 0.84 GiB"),
        ({"data.train": "none.jsonl"}, "Data file not found"),
        ({"model": "./none"}, "Model not found"),
    ],
)
def test_start_refuses_what_would_fail_and_starts_nothing(
    summary: Summary, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], text: str
) -> None:
    refuse(monkeypatch, BusyError("Busy."))  # then the launch itself checks
    html, run, ticket, marks = start(summary, **changed)
    assert text in html and 'role="alert"' in html
    assert (run, ticket) == ("", "t") and not store.list_runs(summary.form.runs)
    assert json.loads(marks)["mistakes"] == {}


def test_start_refuses_broken_rows(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "1 of 2 rows can't be used."
    refuse(monkeypatch, UserError(message, "rows", "Leave them out `--set data.on_invalid=skip`."))
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nq,a\n")
    html, run, _ticket, _marks = start(summary, **{"data.train": str(path)})
    assert message.replace("'", "&#39;") in html and run == ""
    assert 'data-settings="data.on_invalid: skip"' in html


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("lora.rank", 0, "must be at least 1, not 0"),
        ("lora.target_modules", "q_prj", "named q_prj. Did you mean q_proj?"),
    ],
)
def test_start_marks_mistakes_and_moves_the_focus(
    summary: Summary, key: str, value: Any, text: str
) -> None:
    html, run, _ticket, marks = start(summary, **{key: value})
    assert html == run == "" and json.loads(marks)["focus"] is True
    ((marked, message),) = json.loads(marks)["mistakes"].items()
    assert marked == key and text in message


@pytest.mark.slow(minutes=0.1)
def test_one_run_for_each_ticket_also_beside_a_training_one(
    light_runs: LightRuns, kept: previews.Previews
) -> None:
    summary = Summary(Locale("en"), Form(Locale("en"), light_runs.root))
    light_runs.worker(light_runs.launch("endless"))
    # While it trains, free memory says nothing.
    kept._machine = replace(MACHINE, device=replace(MACHINE.device, memory_available=0))
    html, run, ticket, _marks = start(summary)
    assert "is queued" in html and ticket not in ("", "t")
    assert start(summary)[1] == run
    assert len(store.list_runs(light_runs.root)) == 2
