"""`jetson-ft runs …`."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import invoke, run
from typer.testing import CliRunner

from jetson_ft.cli.app import app
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store


def make_run(root: Path, label: str, state: str = "finished") -> store.Run:
    made = store.create_run(Recipe(output_dir=str(root)), label)
    made.write_state(state)
    return made


def test_damaged_run_hides_no_other_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    sound, damaged = make_run(tmp_path, "sound", "stopped"), make_run(tmp_path, "damaged")
    (damaged.path / "recipe.yaml").write_text("model: [")
    done = run("runs", "list", "--runs", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0
    by_name = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert "stopped" in by_name[sound.name]
    assert "embedded" in by_name[sound.name]
    assert "damaged" in by_name[damaged.name].removeprefix(f" {damaged.name}")


def test_empty_folder_has_no_runs(tmp_path: Path) -> None:
    place = tmp_path / "none"
    assert invoke("runs", "list", "--runs", place) == f"No runs in {place} yet.\n"


def test_stopped_run_shows_how_to_resume(tmp_path: Path) -> None:
    stopped = make_run(tmp_path, "a", "stopped")
    done = run("runs", "show", stopped.name, "--runs", str(tmp_path), cwd=tmp_path)
    assert f"train --resume {stopped.path}" in done.stdout
    assert "stopped, nothing to stop" in invoke("runs", "stop", stopped.path)


def test_run_is_described_zipped_and_deleted(tmp_path: Path) -> None:
    made = make_run(tmp_path, "a")
    output = invoke("runs", "describe", made.path, "--title", "first", "--notes", "rate too high")
    assert output == f"{made.name}: first\nrate too high\n"
    assert "first" in invoke("runs", "describe", made.path)
    made.adapter.mkdir()
    (made.adapter / "adapter_config.json").write_text("{}")
    assert invoke("runs", "zip", made.path, tmp_path / "a.zip") == f"{tmp_path / 'a.zip'}\n"
    done = CliRunner().invoke(app, ["runs", "delete", str(made.path)], input="n\n")
    assert done.exit_code == 1 and made.path.exists()
    assert invoke("runs", "delete", made.path, "--yes") == f"{made.name}: deleted\n"
    assert not made.path.exists()
