"""The run directory: all that is stored of a run. docs/run-directory.md lists its files.

`state.json` is written only by the process that holds `supervisor.lock`; `events.jsonl` by the
worker, which inherits `worker.lock` from its supervisor, and by the launcher of several workers.
The file `stop` is present while the run is asked to stop.

A lock (flock) shows that a process lives; a process number doesn't: a lock works across containers,
and after a power cut it is free.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import orjson

from jetson_ft import recipe as recipes
from jetson_ft.errors import Message, UserError, _
from jetson_ft.events import Event, from_json, to_json
from jetson_ft.files import (
    disk_errors,
    expand_user,
    is_disk_full,
    read_json,
    safe_name,
    write_atomic,
    write_json,
)
from jetson_ft.recipe import Recipe

SCHEMA = 1
_RESERVE_BYTES = 1 << 18  # for an attempt's last events and its state
_MAX_WAITING = 200  # events; they must fit into the reserve
TICKET_FILE = "ticket"
LIVE_STATES = ("queued", "running", "stopping")
ENDED_STATES = ("stopped", "finished", "failed")

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class State:
    """The content of `state.json`. Times are seconds since 1970."""

    state: str
    reason: str = ""  # English
    message: dict[str, Any] | None = None  # the reason as `Message.as_json`, for translation
    resumable: bool = False  # it was cut short and can be resumed
    attempt: int = 1
    created: float = 0.0
    updated: float = 0.0
    schema: int = SCHEMA


class RunRemoved(UserError):
    """The run's folder is gone, or another one has taken its place."""

    def __init__(self, path: Path) -> None:
        super().__init__(_("The run's folder has been removed; the run has ended."), str(path))


class Run:
    """One run's folder; the folder's name identifies the run."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._identity: tuple[int, int] | None = None  # of the folder: device and inode
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"  # exists once the run has finished
        self.events_file = path / "events.jsonl"

    def recipe(self) -> Recipe:
        return recipes.load_recipe(self.path / "recipe.yaml")

    def report(self) -> dict[str, Any]:
        """Return report.json, which a finished run has; raise `UserError` without one."""
        return dict(read_json(self.path / "report.json"))

    def state(self) -> State:
        """Return the state written last; `manager.reconcile_state` corrects an outdated one."""
        names = {f.name for f in fields(State)}
        stored = read_json(self.path / "state.json")
        return State(**{key: value for key, value in stored.items() if key in names})

    def write_state(
        self,
        state: str,
        message: Message | None = None,
        resumable: bool = False,
        attempt: int | None = None,
    ) -> None:
        """Write `state.json`, holding `supervisor.lock`; without `attempt` keep its number.

        Raises:
            RunRemoved: as `require_folder`.
        """
        self.require_folder()
        path, now = self.path / "state.json", time.time()
        old = self.state() if path.exists() else State(state, created=now)
        reason, content = (str(message), message.as_json()) if message else ("", None)
        new = State(state, reason, content, resumable, attempt or old.attempt, old.created, now)
        write_json(path, asdict(new))

    def about(self) -> dict[str, Any]:
        """Return `title` and `notes` that a person gave the run; missing keys if none."""
        with suppress(UserError):  # damaged notes are no reason to hide a run
            stored = read_json(self.path / "about.json")
            if isinstance(stored, dict):
                return stored
        return {}

    def require_adapter(self) -> Path:
        """Return the finished adapter's folder; raise `UserError` if there is none yet."""
        if not self.adapter.is_dir():
            what = _("{run} has no adapter yet ({state}).")
            fix = _("Let it finish, or name another run (`jetson-ft runs list`).")
            raise UserError(what, str(self.path), fix, run=self.name, state=self.state().state)
        return self.adapter

    def plan(self) -> dict[str, Any]:
        """Return `plan.json`; empty before the first plan."""
        path = self.path / "plan.json"
        return dict(read_json(path)) if path.exists() else {}

    def request_stop(self) -> None:
        """Ask the worker to save a checkpoint and exit."""
        with disk_errors(self.path):
            (self.path / "stop").touch()

    def stop_requested(self) -> bool:
        """Return whether the run is asked to stop; raise `RunRemoved` as `require_folder`."""
        self.require_folder()
        return (self.path / "stop").exists()

    def require_folder(self) -> None:
        """Raise `RunRemoved` if the folder isn't the one that it was at the first call."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise RunRemoved(self.path) from error
        identity = stat.st_dev, stat.st_ino
        self._identity = self._identity or identity
        if identity != self._identity:
            raise RunRemoved(self.path)

    def clear_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    def reserve_space(self) -> None:
        """Reserve disk space for what must be written at an attempt's end, if the disk is full."""
        path = self.path / "reserve"
        with disk_errors(path):
            try:
                path.write_bytes(os.urandom(_RESERVE_BYTES))  # zeros may take no space
            except OSError:
                path.unlink(missing_ok=True)
                raise

    def release_space(self) -> None:
        """Free the reserved space."""
        (self.path / "reserve").unlink(missing_ok=True)

    def is_locked(self, name: str) -> bool:
        """Return whether a living process holds the lock `worker` or `supervisor`."""
        path = self.path / f"{name}.lock"
        if not path.exists():
            return False
        with open(path, "rb") as file:
            return not try_lock(file, shared=True)

    def events(self) -> list[Event]:
        """Return all complete events; of steps made twice (after a resume), the last attempt's."""
        return last_attempt_events(read_events(self.events_file)[0])

    def last_event(self, kind: type[E]) -> E | None:
        """Return the current attempt's newest event of one kind."""
        attempt, events = self.state().attempt, reversed(self.events())
        return next((e for e in events if isinstance(e, kind) and e.attempt == attempt), None)


def last_attempt_events(events: list[Event]) -> list[Event]:
    """Leave out events of a step that a later attempt has made again."""
    newest: dict[tuple[str, Any], int] = {}
    for event in events:
        key = (event.kind, getattr(event, "step", None))
        newest[key] = max(newest.get(key, 0), event.attempt)
    return [
        event
        for event in events
        if not hasattr(event, "step") or newest[event.kind, event.step] == event.attempt
    ]


def read_events(path: Path, offset: int = 0, limit: int = -1) -> tuple[list[Event], int]:
    """Return the events from a byte offset on, in at most `limit` bytes (-1: all), and the next
    offset.

    A half-written last line is left for the next call; a damaged or unknown one is skipped.
    """
    data = b""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(offset)
        data = file.read(limit)
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        with suppress(ValueError):
            content = orjson.loads(line)
            if isinstance(content, dict) and (event := from_json(content)):
                events.append(event)
    return events, offset + end


class EventLog:
    """Appends events, from any thread; a line is one write, so that two writers never mix.

    While the disk is full, the newest events wait in memory: training goes on without its log until
    a checkpoint can't be written either.
    """

    def __init__(self, run: Run, attempt: int) -> None:
        self._attempt = attempt
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []  # lines, oldest first
        self._path = run.events_file
        with disk_errors(self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def emit(self, event: Event) -> None:
        """Append an event with the time and the attempt's number."""
        event = replace(event, t=round(time.time(), 3), attempt=self._attempt)
        line = (json.dumps(to_json(event), ensure_ascii=False) + "\n").encode()
        with self._lock, disk_errors(self._path):
            self._waiting.append(line)
            try:
                while self._waiting:
                    self._append(self._waiting[0])
                    del self._waiting[0]
            except OSError as error:
                if not is_disk_full(error):
                    raise
                del self._waiting[:-_MAX_WAITING]

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        # A power cut or a full disk may have left half a line; the event must start a new one.
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that becomes full takes a part and refuses the rest
            line = line[os.write(self._file, line) :]


def lock(path: Path, timeout: float = 0.0) -> IO[bytes] | None:
    """Take the lock file, until the returned file is closed; None: another process has it.

    Try for `timeout` seconds: `Run.is_locked` takes a free lock for a moment, to test it.
    """
    with disk_errors(path):
        file = open(path, "ab")  # noqa: SIM115 - held open on purpose
    deadline = time.monotonic() + timeout
    while not try_lock(file):
        if time.monotonic() >= deadline:
            file.close()
            return None
        time.sleep(0.01)
    return file


def try_lock(file: IO[bytes], shared: bool = False) -> bool:
    """Take a flock without waiting; return whether that worked.

    Args:
        shared: to test the lock: two tests at the same time don't see each other.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def create_run(recipe: Recipe, label: str) -> Run:
    """Make a run's folder under `recipe.output_dir`; it is a run once a state is written."""
    root = expand_user(recipe.output_dir).absolute()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
    base = safe_name(f"{time.strftime('%Y%m%d-%H%M%S')}-{stem[:60]}")
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = root / (base if number == 1 else f"{base}-{number}")
            with suppress(FileExistsError):
                path.mkdir()
                break
    try:
        write_atomic(path / "recipe.yaml", recipe.to_yaml())
    except UserError:
        path.rmdir()
        raise
    return Run(path)


def find_run(name: str, root: Path) -> Run:
    """Return a run by path, by name under the root, or `latest`; refuse an unknown name."""
    direct = expand_user(name)
    if is_run(direct):
        return Run(direct.absolute())
    runs = list_runs(root)
    for run in runs:  # the newest first
        if name in (run.name, "latest"):
            return run
    raise UserError(
        _("Run {name!r} not found."),
        str(root),
        _("Newest runs there: {names}.") if runs else _("There are no runs there yet."),
        name=name,
        names=", ".join(run.name for run in runs[:5]),
    )


def run_of_ticket(ticket: str, root: Path) -> Run | None:
    """Return the run under the root that was launched with this ticket."""
    for run in list_runs(root):  # the newest first
        with suppress(OSError):
            if (run.path / TICKET_FILE).read_text() == ticket:
                return run
    return None


def run_by_name(name: str, root: Path) -> Run:
    """Return a run by its folder's name alone, for clients that may not name paths."""
    path = root.absolute() / safe_name(name)
    if not is_run(path):
        raise UserError(
            _("Run {name!r} not found."), str(root), _("It may have been deleted."), name=name
        )
    return Run(path)


def list_runs(root: Path) -> list[Run]:
    """Return all runs under the root, newest first."""
    if not root.is_dir():
        return []
    with disk_errors(root):
        paths = sorted(root.absolute().iterdir(), reverse=True)
        # A name with a dot: a run that is being deleted.
        return [Run(path) for path in paths if not path.name.startswith(".") and is_run(path)]


def runs_with_adapter(root: Path) -> list[Run]:
    """Return the runs under the root that have a finished adapter, newest first."""
    return [run for run in list_runs(root) if run.adapter.is_dir()]


def is_run(path: Path) -> bool:
    """Return whether a path is the folder of a run."""
    return (path / "recipe.yaml").is_file() and (path / "state.json").is_file()
