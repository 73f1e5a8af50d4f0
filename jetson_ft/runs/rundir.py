"""The run directory: the one truth about a run, read alike by terminal, page and worker.

    recipe.yaml      the resolved recipe
    state.json       queued | running | stopping | stopped | finished | failed, and why;
                     written only by who holds supervisor.lock
    processes.json   how many processes train it, and on how many machines
    plan.json        micro-batch, checkpointing, number of steps
    data.json        rows (by their hash) and recipe that a resumed run must meet again
    events.jsonl     one line an event, written by the worker alone
    log.txt          what the processes printed
    checkpoints/     see training.checkpoint
    adapter/         the result, in PEFT's format
    report.json      figures; report.md and report.html for people
    stop             present while somebody asks the run to stop
    worker.lock      held (flock) as long as the worker lives; supervisor.lock likewise

Liveness is such a lock and never a process number: it holds across containers, and after a
power cut it is free.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from jetson_ft import recipe as recipes
from jetson_ft.errors import UserError
from jetson_ft.paths import disk_errors, read_json, safe_name, write_atomic, write_json
from jetson_ft.recipe import Recipe

SCHEMA = 1
LIVE = ("queued", "running", "stopping")
ENDED = ("stopped", "finished", "failed")


@dataclass(frozen=True)
class State:
    """What `state.json` says. Times are seconds since 1970."""

    state: str
    reason: str = ""
    attempt: int = 1
    created: float = 0.0
    updated: float = 0.0
    schema: int = SCHEMA


class Run:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The folder's name, which identifies the run."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where `training.checkpoint` keeps its folders."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def events_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "events.jsonl"

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return recipes.load(self.path / "recipe.yaml")

    def state(self) -> State:
        """What was last written; `jobs.settle` corrects a state nobody is left to correct."""
        known = State.__dataclass_fields__
        found = read_json(self.path / "state.json")
        return State(**{key: value for key, value in found.items() if key in known})

    def write_state(self, state: str, reason: str = "", attempt: int | None = None) -> None:
        """For whoever holds `supervisor.lock`."""
        now = time.time()
        old = self.state() if (self.path / "state.json").exists() else State(state, created=now)
        new = State(state, reason, attempt or old.attempt, old.created, now)
        write_json(self.path / "state.json", asdict(new))

    def request_stop(self) -> None:
        """Asks the worker to leave a checkpoint and end; asking twice changes nothing."""
        with disk_errors(self.path):
            (self.path / "stop").touch()

    def stop_requested(self) -> bool:
        """Whether somebody asked."""
        return (self.path / "stop").exists()

    def clear_stop(self) -> None:
        """Before a new attempt."""
        (self.path / "stop").unlink(missing_ok=True)

    def is_locked(self, name: str) -> bool:
        """Whether a living process holds `worker` or `supervisor`."""
        path = self.path / f"{name}.lock"
        if not path.exists():
            return False
        with open(path, "rb") as file:
            return not try_lock(file)

    def is_live(self) -> bool:
        """Whether any process works on this run."""
        return self.is_locked("worker") or self.is_locked("supervisor")

    def events(self) -> list[dict[str, Any]]:
        """All complete events; of steps made twice (after a resume), the last attempt's."""
        found, _ = read_events(self.events_file)
        return last_attempts(found)


def last_attempts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out what an earlier attempt said about a step that a later attempt made again."""
    newest: dict[tuple[str, int], int] = {}
    for event in events:
        if "step" in event:
            key = (event["kind"], event["step"])
            newest[key] = max(newest.get(key, 0), event["attempt"])
    return [
        event
        for event in events
        if "step" not in event or newest[event["kind"], event["step"]] == event["attempt"]
    ]


def read_events(path: Path, offset: int = 0, limit: int = 1 << 26) -> tuple[list[Any], int]:
    """Complete lines from a byte offset on, at most `limit` bytes.

    Returns:
        The events, and the offset to go on from. A half-written last line is left for
        the next call; a damaged line is passed over.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return list(_parse(data[:end])), offset + end


def _parse(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            event = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            yield event


class EventLog:
    """Appends events; each line goes out in one write, so readers never see two mixed.

    Any thread may tell one.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        self._attempt = attempt
        self._lock = threading.Lock()
        with disk_errors(run.events_file):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._file = os.open(run.events_file, flags, 0o644)
            _end_last_line(run.events_file, self._file)
        self._path = run.events_file

    def emit(self, kind: str, **fields: Any) -> None:
        """One event. Values that JSON doesn't know (NaN) become null."""
        event = {
            "schema": SCHEMA,
            "t": round(time.time(), 3),
            "attempt": self._attempt,
            "kind": kind,
            **{key: _finite(value) for key, value in fields.items()},
        }
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        with self._lock, disk_errors(self._path):
            while line:  # a disk that fills up takes a part and refuses the rest
                line = line[os.write(self._file, line) :]


class Silence:
    """For processes beside the one that writes the events."""

    def emit(self, kind: str, **fields: Any) -> None:
        """Says nothing."""


Log = EventLog | Silence


def _end_last_line(path: Path, file: int) -> None:
    """A power cut may have left half a line; the next event must not be glued to it."""
    if path.stat().st_size:
        with open(path, "rb") as reader:
            reader.seek(-1, os.SEEK_END)
            if reader.read(1) != b"\n":
                os.write(file, b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value


def lock(path: Path, patience: float = 0.0) -> IO[bytes] | None:
    """Takes the lock file and keeps it while the returned file is open; None: somebody has it.

    Args:
        patience: seconds to go on trying. `Run.is_locked` holds a free lock for a moment to
            test it; who must not mistake that for an owner waits it out.
    """
    with disk_errors(path):
        file = open(path, "ab")  # noqa: SIM115 - held open on purpose
    deadline = time.monotonic() + patience
    while not try_lock(file):
        if time.monotonic() >= deadline:
            file.close()
            return None
        time.sleep(0.01)
    return file


def try_lock(file: IO[bytes]) -> bool:
    """Takes an exclusive flock without waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def create(recipe: Recipe, label: str) -> Run:
    """Makes a run's folder under `recipe.output` with its recipe in it.

    It counts as a run once its first state is written.

    Raises:
        UserError: the folder can't be written.
    """
    root = Path(recipe.output).expanduser().absolute()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
    base = safe_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{stem[:60]}")
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            path = root / (base if number == 1 else f"{base}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            try:
                write_atomic(path / "recipe.yaml", recipe.to_yaml())
            except UserError:
                path.rmdir()
                raise
            return Run(path)
    raise UserError("No free name for the run.", str(root), "Remove old runs.")


def find(name: str, root: Path) -> Run:
    """A run by path, by name under the runs root, or the newest (`latest`)."""
    direct = Path(name).expanduser()
    if _is_run(direct):
        return Run(direct.absolute())
    runs = list_runs(root)
    if name == "latest" and runs:
        return runs[0]
    for run in runs:
        if run.name == name:
            return run
    known = ", ".join(run.name for run in runs[:5]) or "none yet"
    raise UserError(f"There is no run {name!r}.", str(root), f"Newest runs there: {known}.")


def named(name: str, root: Path) -> Run:
    """A run by its folder's name alone, for those who may not name paths.

    Raises:
        UserError: there is none of that name.
    """
    path = root.absolute() / safe_name(name)
    if not _is_run(path):
        raise UserError(f"There is no run {name!r}.", str(root), "It may have been deleted.")
    return Run(path)


def list_runs(root: Path) -> list[Run]:
    """All runs under the root, newest first."""
    if not root.is_dir():
        return []
    with disk_errors(root):
        found = [path for path in root.iterdir() if _is_run(path)]
    return [Run(path.absolute()) for path in sorted(found, key=lambda p: p.name, reverse=True)]


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "state.json").is_file()
