"""The Python API, imported from `jetson_ft` itself: `finetune` and `load_chat`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe, load_recipe, parse_recipe
from jetson_ft.runs import exit_status, initial_adapter, manager, store
from jetson_ft.runs.store import LIVE_STATES, Run

if TYPE_CHECKING:
    from jetson_ft.chat.session import ChatSession

_POLL_SECONDS = 0.2


def finetune(
    recipe: Recipe | str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    resume: Run | str | Path | None = None,
    fork: Run | str | Path | None = None,
    runs: str | Path = "runs",
    foreground: bool = False,
) -> Run:
    """Fine-tune to the end; return the finished run, with `run.adapter` and `run.report()`.

    Ctrl-C stops the run with a checkpoint, so that it can be resumed.

    Args:
        recipe: a recipe, its file, or the name of a shipped one.
        overrides: changes of the recipe's keys, as with `--set`: `["lora.rank=32"]`.
        resume: a run to continue instead: itself, its name or path.
        fork: a run whose recipe a new run takes, and whose adapter it starts from.
        runs: folder in which `resume` and `fork` are looked up by name.
        foreground: train in this process, for a debugger; by default a process of its own
            trains, so that running out of memory ends only that one. Needs the main thread.

    Raises:
        UserError: the recipe can't be used, or the run failed or was stopped.
        ValueError: not exactly one of `recipe`, `resume` and `fork` is given.
    """
    if [recipe, resume, fork].count(None) != 2:
        raise ValueError("finetune() takes one of: a recipe, resume=RUN, fork=RUN")
    start = manager.run_in_foreground if foreground else None
    if resume is not None:
        run = resume if isinstance(resume, Run) else store.find_run(str(resume), Path(runs))
        manager.resume(run, overrides, start=start)
    elif fork is not None:
        source = fork if isinstance(fork, Run) else store.find_run(str(fork), Path(runs))
        changed = initial_adapter.fork_recipe(source, list(overrides))
        run = manager.launch(changed, initial_adapter.fork_label(source), start=start)
    elif isinstance(recipe, Recipe):
        changed = parse_recipe(recipe.to_yaml(), overrides=overrides)
        run = manager.launch(changed, "recipe", start=start)
    else:
        loaded = load_recipe(str(recipe), overrides)
        run = manager.launch(loaded, Path(str(recipe)).stem, start=start)
    try:
        _wait(run)
    except KeyboardInterrupt:
        manager.stop(run)
        _wait(run)
        raise
    state = run.state()
    if state.state == "finished":
        return run
    if state.state == "stopped":
        fix = "Continue with `finetune(resume={name!r})`."
        raise UserError("Run {name} was stopped.", str(run.path), fix, name=run.name)
    raise exit_status.last_error(run)


def load_chat(
    name: Run | str | Path = "latest",
    *,
    runs: str | Path = "runs",
    model: str | None = None,
    quantize: str | None = None,
) -> ChatSession:
    """Load a model to chat with; `ChatSession` shows how.

    Args:
        name: a run (itself, its name or path), an adapter's folder, or what a recipe may name as
            `model`; `latest` is the newest run with an adapter, `base` the embedded model.
        runs: folder that holds the runs.
        model: another base model than the run's.
        quantize: another format of its weights: `none`, `int8` or `nf4`.

    Raises:
        UserError: the name is unknown, the run has no adapter yet, or there is too little memory.
    """
    from jetson_ft.chat.target import open_session, resolve_target

    named = str(name.path if isinstance(name, Run) else name)
    return open_session(resolve_target(named, Path(runs), model, quantize))


def _wait(run: Run) -> None:
    while manager.reconcile_state(run) in LIVE_STATES:
        time.sleep(_POLL_SECONDS)
