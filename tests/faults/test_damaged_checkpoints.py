"""A damaged file of a checkpoint is named, and the checkpoint before it is used."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.events import Warned
from jetson_ft.files import sha256_file, write_json
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint

pytestmark = pytest.mark.promise(4)


@pytest.fixture(scope="module")
def killed(workbench: Any) -> Run:
    """A run that was killed after its last checkpoint; tests damage copies of it."""
    run: Run = workbench.run("damaged")
    assert workbench.work(run, "step-9") == -signal.SIGKILL
    return run


@pytest.fixture
def newest(killed: Run, tmp_path: Path) -> Path:
    """The newest of two checkpoints, in a folder of their own."""
    home = tmp_path / "checkpoints"
    shutil.copytree(killed.checkpoints, home)
    return checkpoint.list_checkpoints(home)[-1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = (Path.unlink, truncate, flip, become_fifo, become_folder, become_dangling)
FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json",
    "manifest.json",
)  # fmt: skip


def assert_named(newest: Path, name: str) -> None:
    before = checkpoint.list_checkpoints(newest.parent)[-2]
    intact, faults = checkpoint.newest_intact(newest.parent)
    assert intact == before
    assert len(faults) == 1 and str(newest / name) in str(faults[0])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_chosen(
    newest: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(newest / name)
    # A bit of the manifest is a bit of another file's hash.
    assert_named(newest, "" if (name, damage) == ("manifest.json", flip) else name)


@pytest.mark.parametrize(
    "manifest", [{}, [], None, {"state.json": None}, {"../state.json": "", "state.json": ""}]
)
def test_a_manifest_of_another_shape_is_named(newest: Path, manifest: Any) -> None:
    (newest / "manifest.json").write_text(json.dumps(manifest))
    before = checkpoint.list_checkpoints(newest.parent)[-2]
    intact, faults = checkpoint.newest_intact(newest.parent)
    assert intact == before and len(faults) == 1 and str(newest) in str(faults[0])


@pytest.mark.parametrize(
    "change", [{"step": "8"}, {"tokens": None}, {"step": 7}, {"step_rates": [[]]}, {"step": [8]}]
)
def test_counters_of_a_wrong_type_are_named(newest: Path, change: dict[str, Any]) -> None:
    """Also where the manifest agrees with the file."""
    state = newest / "state.json"
    write_json(state, json.loads(state.read_text()) | change)
    manifest = newest / "manifest.json"
    write_json(manifest, json.loads(manifest.read_text()) | {state.name: sha256_file(state)})
    assert_named(newest, "state.json")


def test_other_files_beside_those_of_a_checkpoint_change_nothing(newest: Path) -> None:
    (newest / "notes.txt").write_text("mine")
    (newest.parent / "step-999").write_text("a file")
    (newest.parent / "step-998").symlink_to("nowhere")
    assert checkpoint.newest_intact(newest.parent) == (newest, [])


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_file_in_a_checkpoints_place_is_replaced(
    newest: Path, make: Callable[[Path], None]
) -> None:
    state = checkpoint.read_state(newest)
    state.step = 99
    make(newest.parent / "step-99")
    made = checkpoint.write_checkpoint(newest.parent, state, lambda folder: None)
    assert checkpoint.newest_intact(newest.parent) == (made, [])


def test_the_resumed_run_names_the_file_and_ends_with_the_same_adapter(
    workbench: Any, killed: Run, finished: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / killed.name)
    shutil.copytree(killed.path, run.path)
    newest = checkpoint.list_checkpoints(run.checkpoints)[-1]
    assert checkpoint.step_of(newest) == 8
    flip(newest / "optimizer.safetensors")
    (run.path / "plan.json").write_text("{,")
    assert workbench.work(run) == 0
    plan, warning = [event.message for event in run.events() if isinstance(event, Warned)]
    assert "plan.json is damaged" in plan and "It is computed again." in plan
    assert run.plan()["steps"] and (run.path / "plan.json.damaged").exists()
    assert str(newest / "optimizer.safetensors") in warning
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (finished.adapter / weights).read_bytes()
