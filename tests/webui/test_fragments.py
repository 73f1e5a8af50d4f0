"""Fragments of runs, without a server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from run_folders import make_run

from jetson_ft.errors import Message
from jetson_ft.events import Warned
from jetson_ft.runs import manager
from jetson_ft.runs.event_log import EventLog
from jetson_ft.webui import fragments
from jetson_ft.webui.fragments import Fragments


def test_every_warning_of_the_attempt_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "warned")
    for text in ("first <fault>", "second", "second"):
        EventLog(run, run.state().attempt).emit(Warned.of_message(Message(text)))
    html = Fragments(tmp_path).run_detail("en", run.name, ())
    assert "⚠ first &lt;fault&gt;" in html and html.count("⚠ second") == 1
    run.write_state("queued", attempt=run.state().attempt + 1)
    assert "⚠" not in Fragments(tmp_path).run_detail("en", run.name, ())


@pytest.mark.parametrize("steps", [0, 3])
def test_page_of_an_ended_run_shows_what_changes_beside_its_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(fragments, "_CACHE_SECONDS", 0.0)
    run, shown = make_run(tmp_path, "ended", steps=steps), Fragments(tmp_path)
    before = shown.run_detail("en", run.name, ())
    manager.set_title_and_notes(run, notes="a note that came later")
    (run.path / "log.txt").write_text("a line that came later\n")
    after = shown.run_detail("en", run.name, ())
    assert "came later" not in before
    assert "a note that came later" in after and "a line that came later" in after


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
        shown.run_detail("en", run.name, ())
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
