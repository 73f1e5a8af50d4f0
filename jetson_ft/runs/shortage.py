"""When training runs out of memory: what is said, and how one more attempt gets by with less.

`plan.json` keeps what a second attempt may take (`grant_gb`), so that attempts after it don't run
into the same wall. It is a limit like `train.max_memory_gb`: by it the planner finds the next
smaller plan, which changes how a step is computed and not what is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.device.probe import Device
from jetson_ft.paths import read_json, write_json
from jetson_ft.runs.rundir import SCHEMA, Run
from jetson_ft.training.group import Group
from jetson_ft.training.memory import OutOfMemory, is_out_of_memory

if TYPE_CHECKING:
    from jetson_ft.training.planner import Plan, Work

_NEW_RUN = "start a new run with a lower data.max_length or lora.rank, or with quantize: nf4"


def write_plan(run: Run, plan: Plan, steps: int) -> None:
    """`plan.json`; what an earlier attempt was granted stays."""
    granted = {key: value for key, value in _stored(run).items() if key == "grant_gb"}
    write_json(_file(run), {"schema": SCHEMA, **plan.as_json(), "steps": steps, **granted})


def within_grant(run: Run, work: Work) -> Work:
    """The work with no more memory than a run that shrinks was granted."""
    granted = _stored(run).get("grant_gb")
    if granted is None or work.train.on_oom != "shrink":
        return work
    limits = [limit for limit in (granted, work.train.max_memory_gb) if limit]
    return replace(work, train=work.train.model_copy(update={"max_memory_gb": min(limits)}))


@contextmanager
def told(run: Run, work: Work, device: Device, group: Group) -> Iterator[None]:
    """Around training: turns any form of too little memory into one that a person can act on.

    Raises:
        OutOfMemory: with the next smaller plan; `again` where it will be tried by itself.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _explained(run, work, device, group) from error


def _explained(run: Run, work: Work, device: Device, group: Group) -> OutOfMemory:
    from jetson_ft.training import planner

    stored = _stored(run)
    plan = planner.Plan(**{key: stored[key] for key in planner.Plan.__dataclass_fields__})
    what = f"Out of memory in training, with {_in_words(plan)}."
    smaller = planner.next_smaller(replace(work, shards=plan.shards), device, plan)
    if smaller is None:
        fix = f"No plan takes less. Close other programs, or {_NEW_RUN}."
        return OutOfMemory(what, str(run.path), fix)
    granted = planner.grant(smaller)
    # The others of a group have no second attempt, and one is enough.
    if work.train.on_oom == "shrink" and group.size == 1 and "grant_gb" not in stored:
        write_json(_file(run), {**stored, "grant_gb": granted})
        fix = f"It starts again from the last checkpoint, once, with {_in_words(smaller)}."
        return OutOfMemory(what, str(run.path), fix, again=True)
    return OutOfMemory(
        what,
        str(run.path),
        f"`jetson-ft train --resume {run.path} --set train.max_memory_gb={granted:g}` goes on from "
        f"the last checkpoint with {_in_words(smaller)}; with `train.on_oom: shrink` a run does so "
        f"by itself, once. Or close other programs, or {_NEW_RUN}.",
    )


def _in_words(plan: Plan) -> str:
    size = f"{plan.micro_batch_tokens:,} tokens" if plan.micro_batch_tokens else "one row"
    kept = "activations recomputed" if plan.checkpointing else "activations kept"
    return (
        f"micro-batches of {size} and {kept} ({(plan.peak_memory_bytes or 0) / 2**30:.2f} GiB "
        "predicted)"
    )


def _stored(run: Run) -> dict[str, Any]:
    path = _file(run)
    return dict(read_json(path)) if path.exists() else {}


def _file(run: Run) -> Path:
    return run.path / "plan.json"
