"""Folders of runs as the worker leaves them, made in milliseconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jetson_ft.events import Evaluated, Step
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run


def step_event(step: int = 1, **changes: Any) -> Step:
    """Return a step with plausible figures; `changes` replaces some."""
    figures = {
        "total_steps": 100, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10,
        "tokens_per_second": 180.0, "seconds_left": 65.0, "memory": 2**31,
    }  # fmt: skip
    return Step(step=step, **(figures | changes))


def evaluated_event(step: int, heldout_loss: float | None) -> Evaluated:
    """Return a measurement on the held-out rows."""
    return Evaluated(step=step, heldout_loss=heldout_loss, bits_per_char=3.5, seconds=1.0)


def make_run(root: Path, name: str, state: str = "finished", steps: int = 3) -> Run:
    """Make a run's folder with so many steps in its events."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("version: 1\n")
    run = Run(folder)
    run.write_state(state)
    log = EventLog(run, 1)
    for number in range(1, steps + 1):
        log.emit(step_event(number, total_steps=10, loss=3.0 / number))
    log.emit(evaluated_event(steps, 2.5))
    return run


def copy_finished(root: Path, name: str = "finished") -> Run:
    """Return a copy of a finished run that version 1 has made; its files can be changed."""
    stored = Path(__file__).parents[1] / "versions" / "1" / "runs" / "finished"
    return Run(shutil.copytree(stored, root / name))
