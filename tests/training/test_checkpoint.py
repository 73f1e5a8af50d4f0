"""A checkpoint is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.errors import UserError
from jetson_ft.training import checkpoint
from jetson_ft.training.state import TrainState


def two_files(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 5000)
    (folder / "optimizer").write_bytes(b"o" * 5000)


def save(home: Path, step: int) -> Path:
    return checkpoint.write_checkpoint(home, TrainState(step=step), two_files)


def listing(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_what_was_written_is_intact_and_read_back(tmp_path: Path) -> None:
    progress = TrainState(step=7, total_steps=9, length_limits=[1.5, None, 4.0], best_loss=0.25)
    folder = checkpoint.write_checkpoint(tmp_path / "home", progress, two_files)
    assert folder == tmp_path / "home" / "step-7"
    assert checkpoint.find_fault(folder) is None
    assert checkpoint.read_state(folder) == progress
    assert checkpoint.newest_intact(tmp_path / "home") == (folder, [])


def test_checkpoints_are_sorted_by_step_and_other_files_ignored(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-8").write_text("a file")
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [
        9,
        10,
        100,
    ]
    assert checkpoint.list_checkpoints(tmp_path / "nowhere") == []


FILES = ["weights", "optimizer", checkpoint.STATE_FILE, checkpoint.MANIFEST]


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, flip])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest / name)
    intact, faults = checkpoint.newest_intact(tmp_path)
    assert intact == before
    assert len(faults) == 1 and str(newest / name) in str(faults[0])
    assert ("missing" if damage is remove else "damaged") in str(faults[0])


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{"])
def test_a_manifest_that_is_no_manifest_is_a_fault(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 1)
    (folder / checkpoint.MANIFEST).write_text(text)
    assert str(folder / checkpoint.MANIFEST) in str(checkpoint.find_fault(folder))


def test_without_an_intact_checkpoint_every_fault_is_returned(tmp_path: Path) -> None:
    for step in (1, 2):
        remove(save(tmp_path, step) / "weights")
    newest, faults = checkpoint.newest_intact(tmp_path)
    assert newest is None and len(faults) == 2


def test_staging_folders_are_deleted(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / ".step-2.tmp").mkdir()
    (tmp_path / ".step-2.tmp" / "weights").write_bytes(b"half")
    assert checkpoint.newest_intact(tmp_path) == (folder, [])
    assert listing(tmp_path) == ["step-1"]


# --- on the disk before it counts ------------------------------------------------------------


def test_all_files_are_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was synced, and a rename only once its folder is."""
    done: list[str] = []
    replace = Path.replace

    def spy(source: Path, target: Path) -> Path:
        done.append(f"-> {target.name}")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", spy)
    at = Path("/proc/self/fd")
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(str((at / str(fd)).readlink())))
    save(tmp_path, 5)
    renamed = done.index("-> step-5")
    staging = tmp_path / ".step-5.tmp"
    synced = {str(staging / "weights"), str(staging / "optimizer"), str(staging)}
    assert synced <= set(done[:renamed])
    assert done.index(str(staging / "weights")) < done.index(f"-> {checkpoint.MANIFEST}")
    assert done[renamed + 1 :] == [str(tmp_path)]


# --- a disk that refuses ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "optimizer"])
def test_a_full_disk_is_reported_and_older_checkpoints_stay(tmp_path: Path, name: str) -> None:
    before = save(tmp_path, 1)

    def fail(folder: Path) -> None:
        two_files(folder)
        (folder / name).unlink()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))

    with pytest.raises(UserError, match="disk is full") as caught:
        checkpoint.write_checkpoint(tmp_path, TrainState(step=2), fail)
    assert str(tmp_path) in str(caught.value.where)
    assert checkpoint.newest_intact(tmp_path) == (before, []) and listing(tmp_path) == ["step-1"]


def test_a_full_disk_is_recognised_in_safetensors_errors(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def fail(folder: Path) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    with pytest.raises(UserError, match="disk is full"):
        checkpoint.write_checkpoint(tmp_path, TrainState(step=2), fail)
    assert listing(tmp_path) == []


def test_a_real_write_error_of_safetensors_becomes_plain(tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk; safetensors itself says it."""
    import resource

    import torch
    from safetensors.torch import save_file

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            checkpoint.write_checkpoint(
                tmp_path,
                TrainState(step=1),
                lambda folder: save_file({"a": torch.zeros(1 << 16)}, folder / "x"),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert listing(tmp_path) == []


def test_other_safetensors_errors_are_unchanged(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def fail(folder: Path) -> None:
        raise SafetensorError("shapes differ")

    with pytest.raises(SafetensorError):
        checkpoint.write_checkpoint(tmp_path, TrainState(step=2), fail)


# --- rotation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [5]), (2, 2, [2, 4, 5]), (2, 5, [4, 5]), (9, 1, [1, 2, 3, 4, 5])],
)
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoint.delete_old_checkpoints(tmp_path, keep, TrainState(step=5, best_step=best))
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == left


def test_damaged_newer_ones_never_push_a_good_one_out(tmp_path: Path) -> None:
    for step in (1, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        flip(tmp_path / f"step-{step}" / "weights")
    good = save(tmp_path, 2)
    checkpoint.delete_old_checkpoints(tmp_path, 2, TrainState(step=2, best_step=1))
    assert checkpoint.newest_intact(tmp_path) == (good, [])
    assert listing(tmp_path) == ["step-1", "step-2"]


# --- tensors ---------------------------------------------------------------------------------


def test_a_restored_optimizer_continues_as_if_never_saved(tmp_path: Path) -> None:
    import torch

    def optimizer() -> Any:
        torch.manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(4, 3))
        return weight, torch.optim.AdamW([weight], lr=0.1)

    def step(weight: Any, adam: Any) -> None:
        weight.grad = weight.detach().cos()
        adam.step()

    first, adam = optimizer()
    step(first, adam)
    checkpoint.save_optimizer(adam, tmp_path)
    second, again = optimizer()
    second.data.copy_(first.data)
    checkpoint.load_optimizer(again, tmp_path)
    for pair in ((first, adam), (second, again)):
        step(*pair)
    assert torch.equal(first, second)
