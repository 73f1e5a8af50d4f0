"""Checkpoints that are complete or absent: staged, hashed, synced, renamed, then rotated.

`checkpoints/step-N/` holds the adapter (PEFT format), the optimizer's state as safetensors, the
counters (`state.json`), and `manifest.json` with the SHA-256 of each file. A folder whose files
differ from its manifest is skipped for the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_errors, read_json, sha256_file, sync_folder, write_json
from jetson_ft.training.state import TrainState

MANIFEST, STATE_FILE, OPTIMIZER_FILE = "manifest.json", "state.json", "optimizer.safetensors"
_NAME = re.compile(r"step-\d+")


def list_checkpoints(home: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    folders = (path for path in home.glob("step-*") if path.is_dir())
    return sorted((path for path in folders if _NAME.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint folder was made at."""
    return int(folder.name.removeprefix("step-"))


def write_checkpoint(home: Path, state: TrainState, save_files: Callable[[Path], None]) -> Path:
    """Make `home/step-N` of the files that `save_files(folder)` writes, and the counters.

    On an error (`UserError`: disk full or not writable) older checkpoints stay as they are.
    """
    target = home / f"step-{state.step}"
    staging = home / f".{target.name}.tmp"
    with disk_errors(home), safetensors_errors():
        home.mkdir(exist_ok=True)  # never the folder of a run that was removed
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            save_files(staging)
            write_json(staging / STATE_FILE, asdict(state))
            files = sorted(path for path in staging.iterdir() if path.is_file())
            for path in files:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            write_json(staging / MANIFEST, {path.name: sha256_file(path) for path in files})
            if target.is_symlink() or target.is_file():
                target.unlink()
            elif target.exists():
                shutil.rmtree(target)
            staging.replace(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(home)
    return target


@contextmanager
def safetensors_errors() -> Iterator[None]:
    """Turn safetensors' errors about a full disk and the like back into `OSError`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if not match:
            raise
        raise OSError(int(match[1]), str(error)) from error


def find_fault(folder: Path) -> Message | None:
    """Return why a checkpoint can't be used, naming the file; None if it is intact."""
    path, fault = folder / MANIFEST, ""
    try:
        hashes = read_json(path) if path.is_file() else {MANIFEST: ""}
        if path.is_file() and STATE_FILE not in hashes:
            raise ValueError("a manifest without the counters")
        for name, digest in hashes.items():
            if name != Path(name).name:
                raise ValueError("a path in the manifest")
            path = folder / name
            if not path.is_file():
                fault = _("{path} is missing")
            elif sha256_file(path) != digest:
                fault = _("{path} is damaged (its SHA-256 differs from the manifest's)")
            if fault:
                break
        path = path if fault else folder / STATE_FILE
        if not fault and read_state(folder).step != step_of(folder):
            fault = _("{path} is damaged (it is of another step)")
    except (UserError, OSError, ValueError, TypeError, AttributeError):
        fault = _("{path} is damaged (it can't be read)")
    return Message(fault, {"path": str(path)}) if fault else None


def newest_intact(home: Path) -> tuple[Path | None, list[Message]]:
    """Return the newest usable checkpoint and the faults of newer ones; delete staging folders."""
    for staging in home.glob(".step-*.tmp"):
        shutil.rmtree(staging, ignore_errors=True)
    faults: list[Message] = []
    for folder in reversed(list_checkpoints(home)):
        fault = find_fault(folder)
        if fault is None:
            return folder, faults
        faults.append(fault)
    return None, faults


def read_state(folder: Path) -> TrainState:
    """Return the counters stored in a checkpoint.

    Raises:
        UserError: the file can't be read.
        ValueError: it has values of other types.
    """
    content = json.dumps(read_json(folder / STATE_FILE))
    return TypeAdapter(TrainState).validate_json(content, strict=True)


def delete_old_checkpoints(home: Path, keep: int, state: TrainState) -> None:
    """Delete all but the best and the `keep` newest; also damaged ones, beyond `state.step`."""
    newest = [path for path in list_checkpoints(home) if step_of(path) <= state.step][-keep:]
    for folder in list_checkpoints(home):
        if folder not in newest and step_of(folder) != state.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def save_optimizer(optimizer: Any, folder: Path) -> None:
    """Write the optimizer's state of each parameter, flat: `<parameter number>.<name>`."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in entry.items()}
    save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """Restore what `save_optimizer` wrote; hyperparameters stay the optimizer's own."""
    from safetensors.torch import load_file

    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(folder / OPTIMIZER_FILE).items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put a checkpoint's adapter weights into a model that has such an adapter."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
