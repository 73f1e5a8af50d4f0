"""Ended runs: describe, delete, download."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

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
