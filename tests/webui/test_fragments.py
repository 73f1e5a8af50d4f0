"""Fragments of runs, without a server."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from run_folders import copy_finished, evaluated_event, make_run, step_event

from jetson_ft.errors import Message, UserError
from jetson_ft.events import Failed, Generated, PhaseStarted, Warned
from jetson_ft.runs import locks, manager, oom
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.queue import QueueTicket
from jetson_ft.runs.store import Run
from jetson_ft.webui import fragments
from jetson_ft.webui.fragments import Fragments


def overview(shown: Fragments, run: Run, *drawn: str) -> str:
    return shown.run_view("en", run.name, "overview", drawn, {})


def test_every_warning_of_the_attempt_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "warned")
    for text in ("first <fault>", "second", "second"):
        EventLog(run, run.state().attempt).emit(Warned.of_message(Message(text)))
    html = overview(Fragments(tmp_path), run)
    assert "first &lt;fault&gt;" in html and html.count(">second<") == 1
    run.write_state("queued", attempt=run.state().attempt + 1)
    assert ">second<" not in overview(Fragments(tmp_path), run)


@pytest.mark.parametrize("steps", [0, 3])
def test_page_of_an_ended_run_shows_what_changes_beside_its_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(fragments, "_CACHE_SECONDS", 0.0)
    run, shown = make_run(tmp_path, "ended", steps=steps), Fragments(tmp_path)
    head = shown.run_head("en", run.name, "overview")
    log = shown.run_view("en", run.name, "log", (), {})
    manager.set_title_and_notes(run, notes="a note that came later")
    (run.path / "log.txt").write_text("a line that came later\n")
    assert "came later" not in head + log
    assert "a note that came later" in shown.run_head("en", run.name, "overview")
    assert "a line that came later" in shown.run_view("en", run.name, "log", (), {})


@pytest.mark.parametrize("evaluated", [True, False])
def test_unchanged_run_is_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:
    monkeypatch.setattr(fragments, "_CACHE_SECONDS", 0.0)
    run, shown, drawn = make_run(tmp_path, "still"), Fragments(tmp_path), []
    if not evaluated:
        lines = run.events_file.read_text().splitlines(keepends=True)
        run.events_file.write_text("".join(line for line in lines if '"eval"' not in line))
    render = fragments.render
    monkeypatch.setattr(
        fragments, "render", lambda *names, **values: drawn.append(1) or render(*names, **values)
    )
    for _read in range(3):
        overview(shown, run)
    assert len(drawn) == 1


def test_fragment_that_is_being_drawn_is_not_drawn_by_another_request(tmp_path: Path) -> None:
    shown, started, go_on, reads = Fragments(tmp_path), Event(), Event(), []

    def read() -> str:
        reads.append(1)
        started.set()
        go_on.wait(10)
        return "source"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shown._cached, "slow", read, str)
        started.wait(10)
        shown._cached("other", str, str)
        second = pool.submit(shown._cached, "slow", read, str)
        go_on.set()
        assert first.result(10) == second.result(10) == "source"
    assert len(reads) == 1


@pytest.mark.parametrize("change", [("a", "b"), ("b", "a"), ("", "a", "b")])
def test_the_same_runs_in_other_colours_are_another_fragment(
    tmp_path: Path, change: tuple[str, ...]
) -> None:
    """The chosen run comes first in a view: the names alone are one key for all of these."""
    for name in ("a", "b"):
        make_run(tmp_path, name)
    shown = Fragments(tmp_path)
    overview(shown, Run(tmp_path / "a"), "a", "", "b")
    shown.run_list("en", "a", ("a", "", "b"))
    legend = dict(
        re.findall(r'<i class="c(\d)"></i>(\w)<', overview(shown, Run(tmp_path / "a"), *change))
    )
    swatches = re.findall(r'swatch c(\d)" data-draw="(\w)"', shown.run_list("en", "a", change))
    colours = {str(place): name for place, name in enumerate(change) if name}
    assert legend == colours == dict(swatches)


def test_more_runs_than_colours_are_drawn_as_far_as_there_are_colours(tmp_path: Path) -> None:
    names = [make_run(tmp_path, f"run-{number}").name for number in range(8)]
    curves = json.loads(Fragments(tmp_path).curves("overview", tuple(names)))
    assert [run["colour"] for run in curves] == list(range(6))


def test_what_pages_make_up_does_not_fill_the_memory(tmp_path: Path) -> None:
    run, shown = make_run(tmp_path, "run"), Fragments(tmp_path)
    for number in range(3):
        made_up = {f"field-{number}": "x", "view": "log"}
        shown.run_view(f"language-{number}", run.name, "log", (), made_up)
        shown.run_table(f"language-{number}", made_up)
    assert len(shown._cache) == 3, "the log, the table and the list of runs"
    for number in range(fragments._MAX_KEPT + 20):
        shown.run_view("en", run.name, "log", (), {"text": str(number)})
        shown.run_table("en", {})
    assert len(shown._cache) == fragments._MAX_KEPT
    assert ("table", "en") in shown._cache, "the others were wanted less recently"


def test_an_action_while_a_fragment_is_read_is_shown_by_the_next_request(tmp_path: Path) -> None:
    shown, states = Fragments(tmp_path), iter(("running", "stopped"))

    def read() -> str:
        state = next(states)
        if state == "running":
            shown.expire()  # another request, which stops the run
        return state

    assert shown._cached("head", read, str) == "running"
    assert shown._cached("head", read, str) == "stopped"
    assert shown._cached("head", read, str) == "stopped", "which is kept"


# The list


def test_list_shows_what_tells_runs_apart(tmp_path: Path) -> None:
    finished = copy_finished(tmp_path, "20260102-000000-quick")
    html = Fragments(tmp_path).run_list("en", finished.name, (finished.name,))
    rows = (finished.last_data() or {})["train"]["rows"]
    loss = finished.report()["eval"]["after"]["loss"]
    for text in (
        f">{finished.title()}<",
        f"{rows}\N{NO-BREAK SPACE}rows",
        "r\N{NO-BREAK SPACE}",
        f">{loss:.3f}<",
    ):
        assert text in html


def names(html: str) -> list[str]:
    return re.findall(r'data-choose="([^"]+)"', html)


def test_list_is_sorted_and_filtered(tmp_path: Path) -> None:
    for number, (title, loss) in enumerate((("Beta", 2.0), ("alpha", 3.0), ("gamma", 1.0))):
        run = make_run(tmp_path, f"20260101-00000{number}-x")
        manager.set_title_and_notes(run, title=title)
        EventLog(run, 1).emit(evaluated_event(9, loss))
    shown = Fragments(tmp_path)
    zero, one, two = (f"20260101-00000{number}-x" for number in range(3))
    assert names(shown.run_list("en", "", ())) == [two, one, zero]
    assert names(shown.run_list("en", "", (), "name")) == [one, zero, two]
    assert names(shown.run_list("en", "", (), "loss")) == [two, zero, one]
    assert names(shown.run_list("en", "", (), "no order", "ALPHA finished")) == [one]
    assert "No run matches" in shown.run_list("en", "", (), "", "delta")
    assert len(names(shown.run_list("zh_CN", "", (), "", "已完成"))) == 3, "as it is shown"


def test_each_drawn_run_has_a_colour_of_its_own(tmp_path: Path) -> None:
    made = [make_run(tmp_path, f"20260101-00000{number}-x").name for number in range(8)]
    html = Fragments(tmp_path).run_list("en", made[0], (made[3], "", made[0], *made[4:8]))
    colours = re.findall(r'class="swatch( c\d)?" data-draw="[^"]+(\d)-x"', html)
    assert dict(map(reversed, colours)) == {
        "3": " c0", "0": " c2", "4": " c3", "5": " c4", "6": " c5", "7": "", "1": "", "2": "",
    }  # fmt: skip


def test_waiting_runs_have_their_place_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    held: list[object] = []
    for number in range(2):
        run = make_run(tmp_path / "runs", f"20260101-00000{number}-x", "queued", steps=0)
        held += [locks.lock(run.path / "supervisor.lock"), QueueTicket(run.state().queued)]
    html = Fragments(tmp_path / "runs").run_list("en", "", ())
    assert html.index("place 2 in the queue") < html.index("next in the queue")
    head = Fragments(tmp_path / "runs").run_head("zh_CN", "20260101-000001-x", "overview")
    assert "排队第 2 位" in head


# The head


def live_run(root: Path) -> tuple[Run, EventLog, object]:
    run = make_run(root, "20260101-000000-live", "running", steps=0)
    held = locks.lock(run.path / "worker.lock")
    return run, EventLog(run, 1), held


def test_measuring_is_not_shown_as_training_at_its_end(tmp_path: Path) -> None:
    run, log, held = live_run(tmp_path)
    log.emit(step_event(100))
    assert "100%" in Fragments(tmp_path).run_list("en", "", ())
    log.emit(PhaseStarted(name="comparison"))
    log.emit(Generated(side="before", done=4, total=10))
    shown = Fragments(tmp_path)
    for html in (shown.run_list("en", "", ()), shown.run_head("en", run.name, "overview")):
        assert "measuring" in html and "100%" not in html and 'class="bar' not in html
    assert "base model, replies: 4 of 10" in shown.run_head("en", run.name, "overview")
    assert held


def test_stopping_run_shows_no_time_left(tmp_path: Path) -> None:
    run, log, held = live_run(tmp_path)
    log.emit(step_event(40))
    assert "1 min 05 s left" in Fragments(tmp_path).run_head("en", run.name, "overview")
    run.write_state("stopping")
    html = Fragments(tmp_path).run_head("en", run.name, "overview")
    assert "writing a checkpoint" in html and "left" not in html
    assert held


def test_failed_run_shows_its_fix_and_offers_smaller_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20260101-000000-x", "failed")
    error = UserError("It <failed>.", "/a/file", "Free `some` space.")
    EventLog(run, 1).emit(Failed(**error.as_json()))
    html = Fragments(tmp_path).run_head("en", run.name, "overview")
    assert "It &lt;failed&gt;." in html and "Free <code>some</code> space." in html
    assert "/a/file" in html and "resume-smaller" not in html
    plan = {"micro_batch_tokens": 64, "checkpointing": False, "peak_memory_bytes": 2**30}
    plan["smaller"] = {**plan, "memory_limit_gb": 0.5}
    (run.path / "plan.json").write_text(json.dumps(plan))
    EventLog(run, 1).emit(step_event(1))
    EventLog(run, 1).emit(Failed(**oom.explain_oom(run).as_json()))
    html = Fragments(tmp_path).run_head("en", run.name, "overview")
    assert "Out of memory in training" in html
    assert 'data-do="resume-smaller"' in html and html.count("primary") == 1
