"""Checkpoints that are whole or not there: staged, hashed, synced, renamed, then rotated.

`checkpoints/step-N/` holds the adapter (PEFT format), the optimizer's state and the random
generators as safetensors, two JSON files with the counters, and `manifest.json` with the
SHA-256 of each file. A folder whose manifest doesn't hold is passed over for the one before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError
from jetson_ft.paths import disk_errors, read_json, sha256_file, sync_folder, write_json

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """The counters of a run; all that a resumed run must know besides the tensors."""

    step: int = 0
    total_steps: int | None = None  # None until `max_minutes` has become a number of steps
    settled_for: list[float] | None = None  # epochs, max_steps, max_minutes behind that number
    eval_every: int | None = None
    tokens: int = 0
    supervised_tokens: int = 0
    rows: int = 0
    train_seconds: float = 0.0  # in optimizer steps alone
    energy_joules: float | None = 0.0  # likewise; None: not known of every step
    best_step: int | None = None
    best_loss: float | None = None
    evals_without_gain: int = 0
    stopped_early: bool = False

    def take(self, seconds: float, joules: float | None) -> None:
        """The time and the energy of one more step."""
        self.train_seconds += seconds
        if self.energy_joules is not None:
            self.energy_joules = None if joules is None else self.energy_joules + joules

    @property
    def complete(self) -> bool:
        """Whether no step is left to make."""
        return self.stopped_early or (
            self.total_steps is not None and self.step >= self.total_steps
        )


def folders(home: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not home.is_dir():
        return []
    found = [path for path in home.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step a checkpoint folder was made at."""
    found = _STEP.fullmatch(folder.name)
    if not found:
        raise ValueError(f"not a checkpoint folder: {folder}")
    return int(found.group(1))


def write(home: Path, progress: Progress, save_files: Callable[[Path], None]) -> Path:
    """Makes `home/step-N` out of what `save_files` puts into the folder it is given.

    Raises:
        UserError: disk full or not writable; older checkpoints are untouched then.
    """
    target = home / f"step-{progress.step}"
    staging = home / f".{target.name}.tmp"
    with disk_errors(home), safetensors_errors():
        home.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            _fill(staging, progress, save_files)
            if target.exists():
                shutil.rmtree(target)
            staging.replace(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(home)
    return target


@contextmanager
def safetensors_errors() -> Iterator[None]:
    """Makes an `OSError` again of what safetensors says about a full disk and the like."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), str(error)) from error


def _fill(staging: Path, progress: Progress, save_files: Callable[[Path], None]) -> None:
    save_files(staging)
    write_json(staging / "progress.json", asdict(progress))
    files = sorted(path for path in staging.iterdir() if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(staging / MANIFEST, {path.name: sha256_file(path) for path in files})


def fault(folder: Path) -> str | None:
    """Why a checkpoint can't be used, naming the file; None if it is intact."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{path} is missing"
    try:
        for name, digest in read_json(path).items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if sha256_file(path) != digest:
                return f"{path} is damaged (its SHA-256 differs from the manifest's)"
    except (UserError, ValueError, AttributeError):
        return f"{path} is damaged (it can't be read)"
    return None


def newest_intact(home: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint, and what was wrong with newer ones. Sweeps staging."""
    for left_over in home.glob(".step-*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    faults: list[str] = []
    for folder in reversed(folders(home)):
        reason = fault(folder)
        if reason is None:
            return folder, faults
        faults.append(reason)
    return None, faults


def read_progress(folder: Path) -> Progress:
    """The counters stored in a checkpoint."""
    return Progress(**read_json(folder / "progress.json"))


def rotate(home: Path, keep: int, progress: Progress) -> None:
    """Deletes all but the `keep` newest checkpoints and the best one.

    Those beyond `progress.step` go too: an earlier attempt left them damaged.
    """
    newest = [path for path in folders(home) if step_of(path) <= progress.step][-keep:]
    for folder in folders(home):
        if folder not in newest and step_of(folder) != progress.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Named tensors as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file written by `save_tensors`, on the CPU."""
    from safetensors.torch import load_file

    return dict(load_file(path))


def optimizer_tensors(optimizer: Any) -> dict[str, Any]:
    """The optimizer's per-parameter state, flat: `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items()
            for name, value in entry.items()}  # fmt: skip


def restore_optimizer(optimizer: Any, tensors: dict[str, Any]) -> None:
    """Puts back what `optimizer_tensors` took; hyperparameters stay the optimizer's own."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def random_states() -> dict[str, Any]:
    """States of torch's random generators; the only ones that training draws from."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` took, as far as this machine has the generator."""
    import torch

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
