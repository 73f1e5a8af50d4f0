"""All that is done with runs as a whole: launch, resume, stop, name, delete.

Each run has a small supervisor process, detached from the process that launched it. It waits until
the machine is free, starts the worker, and records how the worker ended. One run trains at a time:
the worker inherits the lock file of the slot, so that it stays taken if the supervisor is killed.

The process that launches or resumes a run takes `supervisor.lock` and hands it to the supervisor
that it starts. If both are dead, `reconcile_state` takes it.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from jetson_ft import hub
from jetson_ft import recipe as recipes
from jetson_ft.adapter import check_target_modules
from jetson_ft.child_process import python_module
from jetson_ft.data import layouts, readers, sources
from jetson_ft.data import store as rows_store
from jetson_ft.data.formats import RowError
from jetson_ft.data.sources import Source
from jetson_ft.data.template_files import read_template
from jetson_ft.data.templates import TEMPLATES
from jetson_ft.errors import UserError, _
from jetson_ft.events import Event
from jetson_ft.files import (
    DiskFull,
    disk_errors,
    expand_user,
    printable,
    safe_name,
    staged,
    write_atomic,
    write_json,
)
from jetson_ft.hardware import detect
from jetson_ft.models import catalog, files, loading, positions
from jetson_ft.models.dims import dims_from_config
from jetson_ft.recipe import Layout, Recipe
from jetson_ft.runs import (
    contract,
    disk,
    exit_status,
    exports,
    initial_adapter,
    jobs,
    processes,
    store,
)
from jetson_ft.runs.contents import SCHEMA, DamagedRun, open_file
from jetson_ft.runs.exit_status import ExitStatus
from jetson_ft.runs.locks import lock
from jetson_ft.runs.processes import DistributedConfig
from jetson_ft.runs.report import summary
from jetson_ft.runs.restarts import newest_step
from jetson_ft.runs.store import ENDED_STATES, LIVE_STATES, Run

_WORKING_STATES = ("running", "stopping")
Start = Callable[[Run, IO[bytes]], None]  # takes a queued run and its locked supervisor.lock
_PREFLIGHT_ROWS = 100  # checked of each file
# What a recipe takes in the place of a path, and what comes before a file of that name.
RESERVED_NAMES = frozenset(("embedded", "auto", *sources.BUNDLED, *TEMPLATES))


# --- before a run ------------------------------------------------------------------------------


def default_recipe(
    has_gpu: Callable[[], bool] = detect.has_cuda_gpu,
    hub_reachable: Callable[[], bool] = hub.reachable,
) -> tuple[str, str]:
    """Return the shipped recipe to run when none is named, and a line on the reason."""
    if not has_gpu():
        return "quickstart-zh", "no CUDA GPU here, so the embedded model on the CPU"
    if not hub_reachable():
        return "quickstart-zh", f"a GPU, but {hub.endpoint()} is out of reach: the embedded model"
    return "phi-1_5-zh-quick", "a CUDA GPU and the hub in reach: Phi-1.5, at most 60 minutes"


def check_recipe(recipe: Recipe, node_rank: int = 0) -> initial_adapter.Source | None:
    """Raise `UserError` if the model, the chat template or all rows can't be used.

    Data sets on the hub are fetched, and small files of models there. All rows are tokenized where
    `data.max_length` allows longer ones than the model does.

    Args:
        node_rank: of this machine; machine 0 alone needs space for checkpoints.

    Return the initial adapter that was checked, if the recipe names one.
    """
    config = adapter = None
    if recipe.model == "embedded":
        dims = catalog.KNOWN_DIMS[recipe.model]
    else:
        base = files.resolve_model(recipe.model, weights=not files.is_hub_id(recipe.model))
        config = loading.load_config(base)
        dims = catalog.known_dims(base.name) or dims_from_config(config)
    check_target_modules(dims, recipe.lora.target_modules)
    if recipe.lora.initial_adapter:
        adapter = initial_adapter.resolve(recipe.lora.initial_adapter)
        initial_adapter.check(adapter, recipe.lora, dims)
    if node_rank == 0:
        disk.require_checkpoint_space(recipe, dims)
    data = recipe.data
    if data.chat_template:
        read_template(data.chat_template)
    columns: Mapping[str, str] = data.columns.chosen()
    items = data.sources()
    for item in items:
        if item.source in sources.BUNDLED:
            continue
        source, own = sources.resolve_source(item.source), columns
        if len(items) > 1:
            own = rows_store.columns_of(source, data.encoding, columns)
        _check_rows(source, data.format, data.encoding, data.on_invalid, own)
    if isinstance(data.heldout, str) and data.heldout not in ("auto", *sources.BUNDLED):
        source = sources.resolve_source(data.heldout)
        layout, columns = rows_store.heldout_settings(source, data)
        _check_rows(source, layout, "auto", data.on_invalid, columns)
    if config:
        limit = positions.max_positions(config)
        if limit and limit < data.max_length and positions.config_table_size(config):
            from jetson_ft.data.prepare import prepare_rows

            rows = prepare_rows(data, loading.load_tokenizer(base, data.chat_template))
            if rows.longest > limit:
                raise positions.beyond_table(base.name, limit, rows.longest)
    return adapter


def _check_rows(
    source: Source, layout: str, encoding: str, on_invalid: str, columns: Mapping[str, str]
) -> None:
    for path in source.files:
        _report, rows = readers.read_rows(path, encoding)
        values = (row.value for row in islice(rows, _PREFLIGHT_ROWS))
        if any(_is_usable(value, layout, columns) for value in values):
            return
    # Reading all rows finds what is wrong with them, and raises it.
    rows_store.read_source(
        source, layout=layout, encoding=encoding, on_invalid=on_invalid, columns=columns
    )


def _is_usable(value: object, layout: str, columns: Mapping[str, str]) -> bool:
    if not isinstance(value, dict):
        return False
    is_auto = layout == "auto"
    row_layout = layouts.detect_layout(value, columns) if is_auto else cast(Layout, layout)
    try:
        return bool(row_layout and layouts.to_conversation(value, row_layout, columns))
    except RowError:
        return False


# --- launch, resume, stop ----------------------------------------------------------------------


def launch(
    recipe: Recipe,
    label: str,
    config: DistributedConfig | None = None,
    start: Start | None = None,
    ticket: str = "",
) -> Run:
    """Check the recipe, create the run and start its supervisor; return at once.

    Args:
        label: part of the run's name.
        config: its processes; None: one.
        start: starts the work instead of a supervisor (`run_in_foreground`).
        ticket: kept with the run, for `store.run_of_ticket`.

    Raises:
        UserError: the run would fail at its start, or its folder can't be written.
    """
    config = config or DistributedConfig()
    adapter = check_recipe(recipe, config.node_rank)
    run = store.create_run(_with_absolute_paths(recipe), label)
    try:
        with _take_supervisor_lock(run) as lock_file:
            processes.write_distributed_config(run, config)
            if adapter:
                initial_adapter.copy_into(run, adapter)
            if ticket:
                write_atomic(run.path / store.TICKET_FILE, safe_name(ticket))
            run.reserve_space()
            run.write_state("queued")
            (start or _start_supervisor)(run, lock_file)
    except UserError:
        if not run.events_file.exists():  # else it has trained, in this process
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def resume(
    run: Run,
    overrides: Iterable[str] = (),
    config: DistributedConfig | None = None,
    start: Start | None = None,
    restarts: int = 0,
) -> Run:
    """Continue from the last checkpoint.

    Args:
        overrides: `key=value` settings, which may only make the run longer, or name the folder
            that the base model was moved to.
        config: the processes for this attempt and later ones; None keeps the old ones.
        start: as for `launch`.
        restarts: the number in a row of a restart without a person; 0: a person resumes it.

    Raises:
        UserError: it is running, it is finished, an override would change its result, or one of
            its files is damaged. A damaged `state.json` is written anew.
    """
    if is_live(run):
        raise _is_running(run)
    with _take_supervisor_lock(run) as lock_file:
        old, state = run.recipe(), run.state_or_derived()
        # What the worker needs, before it loads the model.
        run.last_data()
        run.newest_event(Event)
        processes.read_distributed_config(run)
        new = recipes.parse_recipe(old.to_yaml(), str(run.path / "recipe.yaml"), overrides)
        contract.check_only_longer(run, old, new)
        if new.model != old.model:  # the same files elsewhere
            contract.check_moved_base(run, new.model)
        if state.state == "finished" and new == old:
            raise UserError(
                _("{run} is finished."),
                str(run.path),
                _("Make it longer (--set train.epochs=…), or start a new run."),
                run=run.name,
            )
        run.reserve_space()  # on a full disk nothing has changed yet
        if new != old:
            write_atomic(run.path / "recipe.yaml", new.to_yaml())
        if config:
            processes.write_distributed_config(run, config)
        run.clear_stop()
        step, attempt = newest_step(run), state.attempt + 1
        run.write_state("queued", attempt=attempt, restarts=restarts, restart_step=step)
        (start or _start_supervisor)(run, lock_file)
    return run


def _take_supervisor_lock(run: Run) -> IO[bytes]:
    """Return the locked `supervisor.lock`; refuse a running run."""
    # The supervisor of a run that has just ended takes a moment to exit.
    lock_file = lock(run.path / "supervisor.lock", timeout=2.0)
    if lock_file and not run.is_locked("worker"):
        return lock_file
    if lock_file:
        lock_file.close()
    raise _is_running(run)


def _is_running(run: Run) -> UserError:
    return UserError(
        _("{run} is running."),
        str(run.path),
        _("Stop it first (`jetson-ft runs stop`)."),
        run=run.name,
    )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths, to resume the run from any folder."""
    copy = recipe.model_copy(deep=True)
    copy.output_dir = str(expand_user(recipe.output_dir).absolute())

    def absolute(value: str) -> str:
        path = expand_user(value)
        return str(path.absolute()) if value not in RESERVED_NAMES and path.exists() else value

    copy.rename_paths(absolute)
    return copy


def _start_supervisor(run: Run, lock_file: IO[bytes]) -> None:
    """Start the supervisor with the lock inherited, so that the run never looks dead."""
    number = lock_file.fileno()
    command = python_module("jetson_ft.runs.supervisor", str(run.path), str(number))
    with disk_errors(run.path), run.open_log() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            pass_fds=[number], start_new_session=True,
        )  # fmt: skip
    # Waited for, or each run would leave a zombie with a server that lives on.
    threading.Thread(target=process.wait, daemon=True).start()


def stop(run: Run) -> None:
    """Request a checkpoint and the end of a run; of one that has ended, the end of its jobs."""
    if is_live(run):
        run.request_stop()
    else:
        for name in jobs.NAMES:
            jobs.stop(run, name)


def is_live(run: Run) -> bool:
    """Return whether the run works or waits; if `state.json` is damaged, by its locks alone."""
    try:
        return reconcile_state(run) in LIVE_STATES
    except DamagedRun:
        return run.is_locked("worker") or run.is_locked("supervisor")


def reconcile_state(run: Run) -> str:
    """Return the run's state, corrected where its processes live or have died without a record.

    Raises:
        DamagedRun: `state.json` can't be used; it is not changed.
    """

    def is_true(state: str) -> bool:
        return state in (_WORKING_STATES if run.is_locked("worker") else ENDED_STATES)

    state = run.state().state
    if run.is_locked("supervisor") or is_true(state):
        return state
    lock_file = lock(run.path / "supervisor.lock")
    if lock_file is None:  # another process has taken it over just now
        return run.state().state
    with lock_file:
        # Read again: it may have ended properly between the first read and the lock.
        if not is_true(run.state().state):
            status = ExitStatus("running")
            if not run.is_locked("worker"):
                status = exit_status.state_from_events(run)
                run.release_space()
            try:
                run.write_state(*status)
            except DiskFull:  # the next call tries again
                return status.state
        return run.state().state


def resumable_runs(root: Path) -> list[Run]:
    """Return the runs under the root that were cut short, newest first."""
    resumable = []
    for run in store.list_runs(root):
        with suppress(UserError):  # a damaged one
            if reconcile_state(run) not in LIVE_STATES and run.state().resumable:
                resumable.append(run)
    return resumable


# --- runs that have ended ----------------------------------------------------------------------


def set_title_and_notes(run: Run, title: str | None = None, notes: str | None = None) -> None:
    """Write the run's title and notes; None keeps the old. The reports take the new title."""
    try:
        about: dict[str, Any] = run.about()
    except DamagedRun:  # these texts replace the damaged ones
        about = {}
    for key, text, limit, too_long in (
        ("title", title, 100, _("The title has {count:,} characters.")),
        ("notes", notes, 20_000, _("The notes have {count:,} characters.")),
    ):
        if text is not None and len(text) > limit:
            raise UserError(too_long, fix=_("At most {limit:,}."), count=len(text), limit=limit)
        if text is not None:
            about[key] = printable(text.strip())
    write_json(run.path / "about.json", {"schema": SCHEMA, **about})
    if title is not None:
        summary.retitle_report(run)


def delete(run: Run) -> None:
    """Remove the folder of a run, damaged or not; refuse one that runs or is exported or served."""
    if is_live(run):
        raise _is_running(run)
    jobs.require_none(run)
    trash = run.path.with_name(f".deleted-{run.name}")
    # Nothing starts meanwhile.
    with _take_supervisor_lock(run), exports.export_lock(run), disk_errors(run.path):
        shutil.rmtree(trash, ignore_errors=True)
        run.path.rename(trash)  # in one step, for all readers
        shutil.rmtree(trash)


def zip_adapter(run: Run, target: Path) -> Path:
    """Write the finished adapter's folder as one file; return its path.

    Raises:
        DamagedRun: the folder contains something else than files.
    """
    run.require_adapter()
    with staged(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(run.adapter.iterdir()):
            with open_file(path):  # not a FIFO, which would never end
                archive.write(path, f"{run.name}/{path.name}")
    return target


# --- in this process ---------------------------------------------------------------------------


def run_in_foreground(run: Run, lock_file: IO[bytes]) -> None:
    """Supervise and train the run in this process, so that a debugger works.

    Takes the same locks and the machine's slot, and writes the same files as a supervisor and its
    worker. The first Ctrl-C stops the run with a checkpoint, the second one without. Only for the
    main thread, which alone may handle signals. The environment of a worker
    (`processes.WORKER_ENVIRONMENT`) isn't set: on a CPU it may be slower and take more memory.
    """
    from jetson_ft.runs import supervisor, worker

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.request_stop()

    def run_attempt(run: Run, _locks: list[IO[bytes]]) -> int:
        run.write_state("running")
        try:
            return worker.main(run, interrupt)
        except KeyboardInterrupt:
            return exit_status.EXIT_STOPPED

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with lock_file:
        signal.signal(signal.SIGINT, interrupt)
        try:
            supervisor.supervise(run, lock_file, run_attempt)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
