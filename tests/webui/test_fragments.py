"""Fragments of runs, without a server."""

from __future__ import annotations

from pathlib import Path

from run_folders import make_run

from jetson_ft.errors import Message
from jetson_ft.events import Warned
from jetson_ft.runs.event_log import EventLog
from jetson_ft.webui.fragments import Fragments


def test_every_warning_of_the_attempt_is_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path, "warned")
    for text in ("first <fault>", "second", "second"):
        EventLog(run, run.state().attempt).emit(Warned.of_message(Message(text)))
    html = Fragments(tmp_path).run_detail("en", run.name, ())
    assert "⚠ first &lt;fault&gt;" in html and html.count("⚠ second") == 1
    run.write_state("queued", attempt=run.state().attempt + 1)
    assert "⚠" not in Fragments(tmp_path).run_detail("en", run.name, ())
