"""Ended runs: describe, delete, download."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from run_folders import copy_finished

from jetson_ft.errors import UserError
from jetson_ft.runs import manager, store


def test_describe_changes_title_or_notes_alone(light_runs: Any) -> None:
    run = light_runs.launch("plain")
    light_runs.wait(run, "finished")
    manager.set_title_and_notes(run, title="first\x1b[31m")
    manager.set_title_and_notes(run, notes="rate too high")
    assert run.about() == {
        "schema": 1,
        "title": "first\\x1b[31m",
        "notes": "rate too high",
    }
    with pytest.raises(UserError, match="The title has 101 characters"):
        manager.set_title_and_notes(run, title="x" * 101)


def test_reports_take_a_new_title(tmp_path: Path) -> None:
    run = copy_finished(tmp_path, "20260101-000000-first")
    report = (run.path / "report.json").read_bytes()
    manager.set_title_and_notes(run, "<b>better")
    html = (run.path / "report.html").read_text()
    assert "<h1>&lt;b&gt;better</h1>" in html and f">{run.name}</div>" in html
    assert (run.path / "report.md").read_text().startswith("# <b>better\n")
    assert (run.path / "report.json").read_bytes() == report
    manager.set_title_and_notes(run, "")
    assert "<h1>first</h1>" in (run.path / "report.html").read_text()
    for damaged in (b"{", report.replace(b'"versions"', b'"renamed"')):
        (run.path / "report.json").write_bytes(damaged)
        manager.set_title_and_notes(run, "later")
        assert run.title() == "later" and "<h1>first</h1>" in (run.path / "report.html").read_text()


def test_delete_removes_an_ended_run_and_refuses_a_live_one(light_runs: Any) -> None:
    run = light_runs.launch("endless")
    light_runs.worker(run)
    with pytest.raises(UserError, match="is running"):
        manager.delete(run)
    manager.stop(run)
    light_runs.wait(run, "stopped")
    manager.delete(run)
    assert store.list_runs(light_runs.root) == [] and list(light_runs.root.iterdir()) == []


def test_zip_has_the_adapter_below_the_runs_name(finished: Any, tmp_path: Path) -> None:
    target = manager.zip_adapter(finished, tmp_path / "adapter.zip")
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        names = {Path(name).name for name in archive.namelist()}
        assert all(name.startswith(f"{finished.name}/") for name in archive.namelist())
    assert names == {path.name for path in finished.adapter.iterdir()}


def test_zip_without_an_adapter_is_refused(light_runs: Any, tmp_path: Path) -> None:
    run = light_runs.launch("plain")
    light_runs.wait(run, "finished")
    with pytest.raises(UserError, match="no adapter yet"):
        manager.zip_adapter(run, tmp_path / "adapter.zip")
    assert not (tmp_path / "adapter.zip").exists()
