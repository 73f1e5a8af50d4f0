"""Background jobs of a run: commands that go on when the page's server ends.

`jobs/NAME/` in the run directory contains `job.json`, `progress.json`, `log.txt`, and `stop` while
the job is asked to end. A keeper (`job_process`), detached from the process that starts the job,
runs the command and records its end. Keeper and command hold `jobs/NAME.lock`: a job is live while
that file is locked.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jetson_ft.child_process import python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import cache_dir, disk_errors, write_json
from jetson_ft.runs import contents, store
from jetson_ft.runs.contents import SCHEMA
from jetson_ft.runs.locks import lock
from jetson_ft.runs.store import Run

# Name of a job -> what a run is while its job is live.
NAMES = {"export": _("{run} is being exported."), "serve": _("{run} is being served.")}
LIVE_STATES = ("running", "stopping")
_LOCK_SECONDS = 1.0  # a keeper that has recorded the end takes a moment to exit


@dataclass(frozen=True)
class Job:
    """The content of `job.json`. Times are seconds since 1970."""

    arguments: list[str]  # of `jetson-ft`
    started: float
    ended: float = 0.0  # 0: not recorded
    # `running`, then `finished`, `failed` or `stopped`; `read` corrects it to `stopping` or `lost`.
    state: str = "running"
    result: dict[str, Any] = field(default_factory=dict)  # the object that the command printed
    error: dict[str, Any] | None = None  # `UserError.as_json`
    schema: int = SCHEMA

    @property
    def is_live(self) -> bool:
        """Whether the command runs."""
        return self.state in LIVE_STATES


@dataclass(frozen=True)
class Progress:
    """The content of `progress.json`, which the command writes (`cli.output.ProgressBar`)."""

    what: str  # the part of the work, English
    done: int
    total: int | None
    since: float  # when this part began; seconds since 1970

    def seconds_left(self, now: float) -> float | None:
        """Return the estimated duration of the rest of this part; None: unknown."""
        if not self.total or not 0 < self.done < self.total or now <= self.since:
            return None
        return (now - self.since) * (self.total - self.done) / self.done


def job_folder(run: Run, name: str) -> Path:
    """Return the folder of a run's job."""
    return run.path / "jobs" / name


def start(run: Run, name: str, arguments: Sequence[str]) -> None:
    """Start `jetson-ft ARGUMENTS` as a job of a run that has an adapter.

    One job of each name works on this machine at a time: each may need most of its memory.

    Args:
        name: a key of `NAMES`.
        arguments: must make the command print one JSON object.

    Raises:
        UserError: such a job is live, the run has no adapter, or the disk refuses a file.
    """
    run.require_adapter()
    folder = job_folder(run, name)
    with disk_errors(folder):
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
    job_lock = lock(folder.with_suffix(".lock"), timeout=_LOCK_SECONDS)
    if job_lock is None:
        raise _is_busy(run, name)
    with job_lock:
        slot = lock(cache_dir("jobs") / name, timeout=_LOCK_SECONDS)
        if slot is None:
            others = (other for other in store.list_runs(run.path.parent) if other.name != run.name)
            raise _is_busy(next((other for other in others if is_live(other, name)), None), name)
        with slot, disk_errors(folder):
            for file in ("stop", "progress.json", "log.txt"):
                (folder / file).unlink(missing_ok=True)
            write_json(folder / "job.json", asdict(Job(list(arguments), time.time())))
            locks = [job_lock.fileno(), slot.fileno()]
            command = python_module("jetson_ft.runs.job_process", str(folder), *map(str, locks))
            with open_log(folder) as log:
                keeper = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    pass_fds=locks, start_new_session=True,
                )  # fmt: skip
    # Waited for, or it would be a zombie of a server that lives on.
    threading.Thread(target=keeper.wait, daemon=True).start()


def _is_busy(run: Run | None, name: str) -> UserError:
    fix = _("Stop that first, or wait for its end.")
    if run is None:  # in another folder of runs
        return UserError(_("This machine does such work for another run."), f"jobs/{name}", fix)
    return UserError(NAMES[name], str(run.path), fix, run=run.name)


def stop(run: Run, name: str) -> None:
    """Request the end of a job; do nothing if it is not live."""
    if is_live(run, name):
        folder = job_folder(run, name)
        with disk_errors(folder):
            (folder / "stop").touch()


def is_live(run: Run, name: str) -> bool:
    """Return whether the job's keeper or its command lives."""
    return run.is_locked(f"jobs/{name}")


def require_none(run: Run, *names: str) -> None:
    """Raise `UserError` if a job of the run is live, of these names or of any."""
    for name in names or NAMES:
        if is_live(run, name):
            raise _is_busy(run, name)


def read(run: Run, name: str) -> Job | None:
    """Return the newest job of that name; None: there was none.

    Its state is `lost` where keeper and command ended without a record: killed, or a power cut.

    Raises:
        DamagedRun: `job.json` can't be used.
    """
    folder = job_folder(run, name)
    if not os.path.lexists(folder / "job.json"):
        return None
    was_live = is_live(run, name)  # before the file is read: the end is recorded before the unlock
    job = read_record(folder)
    if job.ended:
        return job
    if was_live:
        return replace(job, state="stopping" if (folder / "stop").exists() else "running")
    return replace(job, state="lost")


def read_record(folder: Path) -> Job:
    """Return the content of `job.json`; raise `DamagedRun` if it can't be used."""
    path = folder / "job.json"
    stored, names = contents.read_object(path, Job), {item.name for item in fields(Job)}
    job = Job(**{key: value for key, value in stored.items() if key in names})
    try:
        if job.error is not None:
            UserError.from_json(job.error)
    except (ValueError, KeyError) as error:
        reason = _("its message is not valid ({error})")
        raise contents.DamagedRun(path, reason, error=str(error)) from error
    return job


def read_progress(run: Run, name: str) -> Progress | None:
    """Return how far a job has come, as far as it is known."""
    names = [item.name for item in fields(Progress)]
    with suppress(UserError):  # missing or damaged
        stored = contents.read_object(job_folder(run, name) / "progress.json", Progress)
        return Progress(**{key: stored[key] for key in names})
    return None


def open_log(folder: Path) -> Any:
    """Open a job's `log.txt`, to append to it."""
    return open(contents.open_to_append(folder / "log.txt"), "ab")


def error_of(job: Job) -> UserError | None:
    """Return why the job has failed; None: it hasn't."""
    if job.state == "lost":
        what = Message(_("The job ended without a record: it was killed, or the machine stopped."))
        return UserError(what, fix=_("Start it again."))
    return UserError.from_json(job.error) if job.error else None
