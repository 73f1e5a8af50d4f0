"""A benchmark from its settings to `bench.md` and `bench.json`.

Each variant of each round is a new process, one at a time. Rounds are interleaved (A B C, A B C),
so that a slow phase of the machine affects all variants. This process stays small: the variants
can't use the memory that it takes.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jetson_ft.bench import table
from jetson_ft.bench.table import Measurement, Report
from jetson_ft.bench.variants import VARIANTS
from jetson_ft.bench.workload import BenchWorkload, Settings, load_workload
from jetson_ft.child_process import python_module
from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors, read_json, write_atomic, write_json
from jetson_ft.runs import exit_status
from jetson_ft.runs.processes import WORKER_ENVIRONMENT
from jetson_ft.runs.report import summary


@dataclass(frozen=True)
class VariantProgress:
    """A variant's process in a round: about to start, or ended with its measurement."""

    number: int  # from 1, over all rounds
    of: int
    round: int
    variant: str
    seconds_left: float | None
    measured: Measurement | None = None


def bench(
    settings: Settings, output: Path, on_progress: Callable[[VariantProgress], None]
) -> Report:
    """Run the benchmark; return the content of `bench.json`.

    Both files are written to `output` after each variant, so that an interrupt loses only the one
    that runs. `on_progress` is called at the start and at the end of each variant in each round.

    Raises:
        UserError: a variant, the model or the data doesn't exist, no variant can run here, or the
            folder can't be written.
    """
    skipped = unavailable_variants(settings)
    names = [name for name in settings.variants if name not in skipped]
    if not names:
        raise UserError(
            _("None of the variants can run here."),
            "; ".join(f"{name}: {reason}" for name, reason in skipped.items()),
            _("Add `trainer` and `ours`."),
        )
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    workload = _prepare_workload(settings)
    report: Report = {
        "schema": 1,
        "created": time.time(),
        "versions": summary.versions(),
        "device": asdict(workload.device),
        "settings": asdict(settings),
        "precision": workload.weights.precision,
        "workload": {
            "rows": len(workload.rows),
            "steps": len(workload.steps()),
            "timed_tokens": workload.timed_tokens(),
        },
        "variants": {name: VARIANTS[name].description for name in settings.variants},
        "skipped": skipped,
        "rounds": [],
        "rounds_done": 0,
    }
    write(output, report)
    turns = [(number, name) for number in range(1, settings.rounds + 1) for name in names]
    durations: dict[str, float] = {}  # seconds, of each variant's latest process
    with tempfile.TemporaryDirectory() as folder:
        workload.write(Path(folder) / "workload.json")
        for index, (round_, name) in enumerate(turns):
            left = table.seconds_left([variant for _, variant in turns[index:]], durations)
            turn = VariantProgress(index + 1, len(turns), round_, name, left)
            on_progress(turn)
            started = time.monotonic()
            figures = _run_process(name, settings.threads, Path(folder), output)
            durations[name] = time.monotonic() - started
            measured = {"round": round_, "variant": name, **figures}
            report["rounds"].append(measured)
            report["rounds_done"] = len(report["rounds"]) // len(names)
            write(output, report)
            on_progress(replace(turn, measured=measured))
    return report


def _prepare_workload(settings: Settings) -> BenchWorkload:
    """Return the workload, from a process that ends, and frees its memory, before the variants."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        arguments = json.dumps(asdict(settings)), str(path)
        done = subprocess.run(
            python_module("jetson_ft.bench.workload", *arguments), stdin=subprocess.DEVNULL
        )
        if done.returncode == exit_status.EXIT_REFUSED:
            raise UserError.from_json(read_json(path))
        done.check_returncode()
        return load_workload(path)


def unavailable_variants(settings: Settings) -> dict[str, str]:
    """Return the variants that can't run on this machine, each with the reason.

    Raises:
        UserError: a variant doesn't exist.
    """
    reasons = {}
    for name in settings.variants:
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, 1)
            fix = _("Did you mean {near}? Known: {known}.") if near else _("Known: {known}.")
            known = ", ".join(VARIANTS)
            raise UserError(_("Variant not found."), name, fix, near="".join(near), known=known)
        if reason := VARIANTS[name].unavailable(settings):
            reasons[name] = reason
    return reasons


def _run_process(name: str, threads: int, folder: Path, output: Path) -> Measurement:
    """Run a variant in a process; return what it measured, or why it failed."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    module, workload = "jetson_ft.bench.variants", str(folder / "workload.json")
    # The same for all variants: the environment of a run's worker, with the threads fixed.
    count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with disk_errors(output), open(output / "log.txt", "ab") as log:
        log.write(f"\n== {name}\n".encode())
        log.flush()
        done = subprocess.run(
            python_module(module, name, workload, str(result)),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False,
            env={**WORKER_ENVIRONMENT, **os.environ, **count},
        )  # fmt: skip
    if result.exists():
        return dict(read_json(result))
    if done.returncode < 0:
        return {"error": str(exit_status.describe_signal(-done.returncode))}
    return {"error": f"ended with code {done.returncode} and no result; see log.txt"}


def write(output: Path, report: Report) -> None:
    """Write both files, with the table over all measurements so far."""
    rows = table.summarize(list(report["variants"]), report["skipped"], report["rounds"])
    report["summary"] = [asdict(row) for row in rows]
    write_json(output / "bench.json", report)
    write_atomic(output / "bench.md", table.markdown(report))
