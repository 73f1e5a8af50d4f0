"""A benchmark from its settings to `bench.md` and `bench.json`.

Each arm of each round is a fresh process, one at a time, rounds interleaved (A B C, A B C):
whatever else the machine does meets all arms. This process stays small, as its memory is
missing to them.
"""

from __future__ import annotations

import difflib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson_ft.bench import lesson as lessons
from jetson_ft.bench import table
from jetson_ft.bench.arms import ARMS
from jetson_ft.bench.lesson import Lesson, Settings
from jetson_ft.errors import UserError
from jetson_ft.paths import disk_errors, read_json, write_atomic, write_json
from jetson_ft.runs import ending, report
from jetson_ft.runs.supervisor import WORKER_ENVIRONMENT

SCHEMA = 1


@dataclass(frozen=True)
class Turn:
    """An arm's process in a round, about to start, or ended with its measurement."""

    number: int
    of: int
    round: int
    arm: str
    seconds_left: float | None
    measured: dict[str, Any] | None = None


Listener = Callable[[Turn], None]


def bench(settings: Settings, output: Path, listener: Listener) -> dict[str, Any]:
    """Runs it and returns what is in `bench.json`, which is kept up to date after each arm.

    Raises:
        UserError: there is no such arm, model or data, no arm can run here, or the folder
            can't be written.
    """
    skipped = lacking(settings)
    if len(skipped) == len(settings.arms):
        told = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError("None of the arms can run here.", told, "Add `trainer` and `ours`.")
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    lesson = _prepared(settings)
    found = _facts(lesson, skipped)
    write(output, found)
    with tempfile.TemporaryDirectory() as folder:
        lesson.write(Path(folder) / "lesson.json")
        _rounds(found, Path(folder), output, listener)
    return found


def lacking(settings: Settings) -> dict[str, str]:
    """The arms that can't run on this machine, each with the reason.

    Raises:
        UserError: no arm is called so.
    """
    for name in settings.arms:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError("There is no such arm.", name, f"{hint}Known: {', '.join(ARMS)}.")
    reasons = {name: ARMS[name].lacks(settings) for name in settings.arms}
    return {name: reason for name, reason in reasons.items() if reason}


def _prepared(settings: Settings) -> Lesson:
    """From a process that ends before the first arm starts, and with it the memory it took."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(lessons.prepare, settings).result()


def _facts(lesson: Lesson, skipped: dict[str, str]) -> dict[str, Any]:
    """`bench.json` before the first round."""
    settings = lesson.settings
    return {
        "schema": SCHEMA,
        "created": time.time(),
        "versions": report.versions(),
        "device": lesson.device.as_json(),
        "settings": asdict(settings),
        "precision": lesson.precision,
        "lesson": {
            "rows": len(lesson.rows),
            "steps": len(lesson.steps()),
            "timed_tokens": lesson.timed_tokens(),
        },
        "arms": {name: ARMS[name].description for name in settings.arms},
        "skipped": skipped,
        "rounds": [],
    }


def _rounds(found: dict[str, Any], folder: Path, output: Path, listener: Listener) -> None:
    names = [name for name in found["arms"] if name not in found["skipped"]]
    turns = [(r, name) for r in range(1, found["settings"]["rounds"] + 1) for name in names]
    taken: list[tuple[str, float]] = []
    for number, (round_, name) in enumerate(turns, 1):
        left = table.seconds_left([arm for _, arm in turns[number - 1 :]], taken)
        turn = Turn(number, len(turns), round_, name, left)
        listener(turn)
        started = time.monotonic()
        measured = {"round": round_, "arm": name} | _child(name, found, folder, output)
        taken.append((name, time.monotonic() - started))
        found["rounds"].append(measured)
        write(output, found)
        listener(Turn(number, len(turns), round_, name, left, measured))


def _child(name: str, found: dict[str, Any], folder: Path, output: Path) -> dict[str, Any]:
    """What an arm's process measured, or why it failed."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    lesson = str(folder / "lesson.json")
    command = [sys.executable, "-m", "jetson_ft.bench.arm", name, lesson, str(result)]
    with disk_errors(output), open(output / "log.txt", "ab") as log:
        log.write(f"\n== {name}\n".encode())
        log.flush()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
            env=_environment(found["settings"]["threads"]),
        )  # fmt: skip
    if result.exists():
        return dict(read_json(result))
    died = ending.of_signal(-done.returncode) if done.returncode < 0 else "ended without a word"
    return {"error": died}


def _environment(threads: int) -> dict[str, str]:
    """The same for all arms: that of a run's worker, with the threads fixed."""
    count = str(threads)
    return {**WORKER_ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def write(output: Path, found: dict[str, Any]) -> None:
    """Both files, with the table over what has been measured so far."""
    lines = table.summarise(list(found["arms"]), found["skipped"], found["rounds"])
    found["summary"] = [asdict(line) for line in lines]
    found["rounds_done"] = _complete_rounds(found)
    write_json(output / "bench.json", found)
    write_atomic(output / "bench.md", table.markdown(found))


def _complete_rounds(found: dict[str, Any]) -> int:
    names: Sequence[str] = [name for name in found["arms"] if name not in found["skipped"]]
    return len(found["rounds"]) // max(1, len(names))
