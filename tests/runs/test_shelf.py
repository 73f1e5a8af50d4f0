"""Naming, deleting and taking away."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.runs import jobs, live, rundir, shelf


def test_title_and_notes_are_kept_apart(shop: Any) -> None:
    run = shop.launch("plain")
    shop.wait(run, "finished")
    shelf.describe(run, title="first\x1b[31m")
    shelf.describe(run, notes="rate too high")
    assert live.about(run) == {"schema": 1, "title": "first\\x1b[31m", "notes": "rate too high"}
    with pytest.raises(UserError, match="The title has 101 characters"):
        shelf.describe(run, title="x" * 101)


def test_an_ended_run_is_deleted_and_a_living_one_is_not(shop: Any) -> None:
    run = shop.launch("endless")
    shop.worker(run)
    with pytest.raises(UserError, match="is running"):
        shelf.delete(run)
    jobs.stop(run)
    shop.wait(run, "stopped")
    shelf.delete(run)
    assert rundir.list_runs(shop.root) == [] and list(shop.root.iterdir()) == []


def test_the_adapter_is_zipped_under_the_runs_name(finished: Any, tmp_path: Path) -> None:
    target = shelf.zip_adapter(finished, tmp_path / "adapter.zip")
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        names = {Path(name).name for name in archive.namelist()}
        assert all(name.startswith(f"{finished.name}/") for name in archive.namelist())
    assert names == {path.name for path in finished.adapter.iterdir()}


def test_without_an_adapter_nothing_is_written(shop: Any, tmp_path: Path) -> None:
    run = shop.launch("plain")
    shop.wait(run, "finished")
    with pytest.raises(UserError, match="no adapter yet"):
        shelf.zip_adapter(run, tmp_path / "adapter.zip")
    assert not (tmp_path / "adapter.zip").exists()
