"""The run directory: all that is stored of a run. docs/run-directory.md lists its files.

`state.json` is written only by the process that holds `supervisor.lock`; `events.jsonl` by the
worker, which inherits `worker.lock` from its supervisor, and by the launcher of several workers.
The file `stop` is present while a person asks the run to stop, `shutdown` while a shutdown does.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from jetson_ft import recipe as recipes
from jetson_ft.errors import Message, RecipeError, UserError, _
from jetson_ft.events import MAX_ATTEMPT, Event
from jetson_ft.files import (
    disk_errors,
    expand_user,
    printable,
    safe_name,
    write_atomic,
    write_json,
)
from jetson_ft.recipe import Recipe
from jetson_ft.runs import contents
from jetson_ft.runs.contents import SCHEMA, DamagedRun, NewerRun
from jetson_ft.runs.event_reader import E, iter_events, last_attempt_events, newest_event
from jetson_ft.runs.locks import try_lock

_RESERVE_BYTES = 1 << 18  # for an attempt's last events and its state
TICKET_FILE = "ticket"
LIVE_STATES = ("queued", "running", "stopping")
ENDED_STATES = ("stopped", "finished", "failed")
_MAX_RECIPE_BYTES = 1 << 20
_LAUNCH_SECONDS = 5.0  # between the folder of a new run and its first state, at most
_RUN_NAME = re.compile(r"^\d{8}-\d{6}-")


@dataclass(frozen=True)
class State:
    """The content of `state.json`. Times are seconds since 1970."""

    state: str
    reason: str = ""  # English
    message: dict[str, Any] | None = None  # the reason as `Message.as_json`, for translation
    resumable: bool = False  # it was cut short and can be resumed
    interrupted: bool = False  # by a power cut, a crash or a shutdown, not by a person or a fault
    restarts: int = 0  # of its own accord (`run.auto_resume`), in a row without a new checkpoint
    restart_step: int = 0  # that of the newest checkpoint at the last restart
    queued: float = 0.0  # when this attempt was put into the queue
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

    @property
    def label(self) -> str:
        """The run's name without the time at its beginning."""
        return _RUN_NAME.sub("", self.name, count=1)

    def recipe(self) -> Recipe:
        """Return the resolved recipe.

        Raises:
            DamagedRun: `recipe.yaml` can't be used.
        """
        path = self.path / "recipe.yaml"
        try:
            text = contents.read_bytes(path, _MAX_RECIPE_BYTES).decode("utf-8-sig")
            if not text.strip():  # which would be a recipe of defaults
                raise DamagedRun(path, _("it is empty"))
            return recipes.parse_recipe(text, str(path))
        except RecipeError as error:
            text = printable(str(error.what))
            raise DamagedRun(path, _("it is not a recipe ({error})"), error=text) from error
        except UnicodeDecodeError as error:
            raise DamagedRun(path, _("not UTF-8 text")) from error

    def report(self) -> dict[str, Any]:
        """Return the content of `report.json`, which a finished run has.

        Raises:
            DamagedRun: the file is missing or can't be used.
        """
        return contents.read_object(self.path / "report.json", contents.Report)

    def state(self) -> State:
        """Return the state written last; `manager.reconcile_state` corrects an outdated one.

        Raises:
            DamagedRun: the file is missing or can't be used.
        """
        path = self.path / "state.json"
        stored, names = contents.read_object(path, State), {item.name for item in fields(State)}
        state = State(**{key: value for key, value in stored.items() if key in names})
        if state.state not in LIVE_STATES + ENDED_STATES:
            name = printable(state.state[:100])
            raise DamagedRun(path, _("the state {name!r} is not known here"), name=name)
        if not 1 <= state.attempt <= MAX_ATTEMPT:
            raise DamagedRun(path, _("there is no attempt {number}"), number=state.attempt)
        try:
            Message.from_json(state.message or Message("").as_json())
        except ValueError as error:
            text = str(error)
            raise DamagedRun(path, _("its message is not valid ({error})"), error=text) from error
        return state

    def state_or_derived(self) -> State:
        """Return `state`; if the file is damaged, what can be known without it.

        The attempt is that of the newest event; the run has failed and can be resumed.

        Raises:
            NewerRun: `state.json` is of a later version.
        """
        try:
            return self.state()
        except NewerRun:
            raise
        except DamagedRun as error:
            newest = None
            with suppress(DamagedRun):
                newest = self.newest_event(Event)
            return State(
                "failed", str(error.what), error.what.as_json(), resumable=True,
                attempt=newest.attempt if newest else 1, created=time.time(), updated=time.time(),
            )  # fmt: skip

    def write_state(
        self,
        state: str,
        message: Message | None = None,
        resumable: bool = False,
        interrupted: bool = False,
        **changes: Any,
    ) -> None:
        """Write `state.json`, holding `supervisor.lock`.

        Args:
            changes: other fields of `State` that change, such as `attempt`; the rest is kept.

        Raises:
            RunRemoved: as `require_folder`.
        """
        self.require_folder()
        path, now = self.path / "state.json", time.time()
        is_first = not os.path.lexists(path) and not os.path.lexists(self.events_file)
        old = State(state, created=now) if is_first else self.state_or_derived()
        reason, content = (str(message), message.as_json()) if message else ("", None)
        if state == "queued" and (old.state != state or not old.queued):
            changes["queued"] = now
        new = replace(
            old, state=state, reason=reason, message=content, resumable=resumable,
            interrupted=interrupted, updated=now, **changes,
        )  # fmt: skip
        write_json(path, asdict(new))

    def about(self) -> dict[str, str]:
        """Return `title` and `notes` that a person gave the run; missing keys if none.

        Raises:
            DamagedRun: `about.json` can't be used.
        """
        path = self.path / "about.json"
        return contents.read_object(path, contents.About) if os.path.lexists(path) else {}

    def title(self) -> str:
        """Return the title that a person gave the run, else its folder's name."""
        with suppress(DamagedRun):  # damaged notes are no reason to hide a run
            return self.about().get("title") or self.name
        return self.name

    def has_adapter(self) -> bool:
        """Return whether the run has a finished adapter."""
        with suppress(OSError):  # a folder of someone else
            return self.adapter.is_dir()
        return False

    def require_adapter(self) -> Path:
        """Return the finished adapter's folder; raise `UserError` if there is none yet."""
        if not self.has_adapter():
            what = _("{run} has no adapter yet ({state}).")
            fix = _("Let it finish, or name another run (`jetson-ft runs list`).")
            raise UserError(what, str(self.path), fix, run=self.name, state=self.state().state)
        return self.adapter

    def plan(self) -> dict[str, Any]:
        """Return the content of `plan.json`; empty before the first plan.

        Raises:
            DamagedRun: the file can't be used.
        """
        path = self.path / "plan.json"
        return contents.read_object(path, contents.Plan) if os.path.lexists(path) else {}

    def set_damaged_plan_aside(self) -> Message | None:
        """Rename a damaged `plan.json`, so that a new one can be written; return the fault."""
        path = self.path / "plan.json"
        try:
            self.plan()
        except DamagedRun as error:
            with disk_errors(path):
                path.rename(path.with_name("plan.json.damaged"))
            return error.what
        return None

    def last_data(self) -> dict[str, Any] | None:
        """Return `data.json` of the last attempt (`contents.Data`); None: there was none.

        Raises:
            DamagedRun: `data.json` can't be used.
        """
        path = self.path / "data.json"
        if not os.path.lexists(path):
            return None
        try:
            stored = contents.read_object(path, contents.Data)
            Recipe.model_validate(stored["recipe"])
        except DamagedRun as error:
            fix = _("Put back an intact copy of it; or move it away: then nothing compares the "
                    "rows with those of the last attempt.")  # fmt: skip
            raise DamagedRun(path, error.reason, fix) from error
        except ValueError as error:
            raise DamagedRun(path, _("its recipe is not valid")) from error
        return stored

    def request_stop(self, is_shutdown: bool = False) -> None:
        """Ask the worker to save a checkpoint and exit.

        Args:
            is_shutdown: the machine, the container or the service ends, and no person stops the
                run; a request of a person, earlier or later, remains one.
        """
        with disk_errors(self.path):  # a file's existence counts: a full disk may take no content
            (self.path / ("shutdown" if is_shutdown else "stop")).touch()

    def is_shutting_down(self) -> bool:
        """Return whether the run is asked to stop, by a shutdown and not by a person."""
        return (self.path / "shutdown").exists() and not (self.path / "stop").exists()

    def stop_requested(self) -> bool:
        """Return whether the run is asked to stop; raise `RunRemoved` as `require_folder`."""
        self.require_folder()
        return any((self.path / name).exists() for name in ("stop", "shutdown"))

    def require_folder(self) -> None:
        """Raise `RunRemoved` if the folder isn't the one that it was at the first call."""
        try:
            stat = self.path.stat()
        except OSError as error:
            raise RunRemoved(self.path) from error
        self._identity = self._identity or (stat.st_dev, stat.st_ino)
        if self._identity != (stat.st_dev, stat.st_ino):
            raise RunRemoved(self.path)

    def clear_stop(self) -> None:
        """Withdraw the requests to stop."""
        for name in ("shutdown", "stop"):  # so that a person's request never looks like a shutdown
            (self.path / name).unlink(missing_ok=True)

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
        """Return whether a living process holds the lock `worker` or `supervisor`.

        Raises:
            DamagedRun: the lock file belongs to someone else.
        """
        path = self.path / f"{name}.lock"
        try:
            number = contents.open_regular(path, os.O_RDONLY)
        except PermissionError as error:
            reason = _("it can't be read ({error})")
            raise DamagedRun(path, reason, error=error.strerror or "") from error
        except (OSError, DamagedRun):  # missing, or nothing that a process could hold
            return False
        with open(number, "rb") as file:
            return not try_lock(file, shared=True)

    def events(self) -> list[Event]:
        """Return all events; `iter_events` reads a log of any size."""
        return list(self.iter_events(Event))

    def iter_events(self, *kinds: type[E]) -> Iterator[E]:
        """Yield the events of these kinds (`Event`: of all), the oldest first.

        Of steps made twice (after a resume), yield the last attempt's.

        Raises:
            DamagedRun: `events.jsonl` can't be read.
        """
        stepped = [kind for kind in kinds if kind is Event or "step" in kind.__dataclass_fields__]
        events = iter_events(self.events_file, *kinds)
        if not stepped:  # no step could be made twice
            return events
        return last_attempt_events(iter_events(self.events_file, *stepped), events)

    def last_event(self, kind: type[E]) -> E | None:
        """Return the current attempt's newest event of one kind.

        Raises:
            DamagedRun: `events.jsonl` can't be read.
        """
        return newest_event(self.events_file, kind, self.state_or_derived().attempt)

    def newest_event(self, kind: type[E]) -> E | None:
        """Return the newest event of a kind (`Event`: of any) of all attempts."""
        return newest_event(self.events_file, kind)

    def open_log(self) -> IO[bytes]:
        """Open `log.txt`, to append to it; raise `DamagedRun` if it is no file."""
        return open(contents.open_to_append(self.path / "log.txt"), "ab")


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


def short_titles(runs: Sequence[Run]) -> list[str]:
    """Return the runs' titles, labels in the place of names; their names if two are equal."""
    titles = [run.label if run.title() == run.name else run.title() for run in runs]
    return titles if len(set(titles)) == len(runs) else [run.name for run in runs]


def run_of_ticket(ticket: str, root: Path) -> Run | None:
    """Return the run under the root that was launched with this ticket."""
    for run in list_runs(root):  # the newest first
        with suppress(DamagedRun):
            if contents.read_bytes(run.path / TICKET_FILE) == ticket.encode():
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
    return [run for run in list_runs(root) if run.has_adapter()]


def is_run(path: Path) -> bool:
    """Return whether a folder is a run's, damaged or not.

    A run that is being launched has a young recipe and nothing else yet.
    """
    try:
        names = {entry.name for entry in path.iterdir()}
        if "state.json" in names:
            return True
        if "recipe.yaml" not in names:
            return False
        age = time.time() - (path / "recipe.yaml").lstat().st_mtime
        return "events.jsonl" in names or age > _LAUNCH_SECONDS
    except PermissionError:
        return bool(_RUN_NAME.match(path.name))  # as far as can be known of someone else's folder
    except (OSError, ValueError):
        return False
