"""What is served, under which names, and by which engine; the files that it needs are made here."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jetson_ft.adapter import WEIGHTS_FILE
from jetson_ft.chat import memory_guard
from jetson_ft.errors import Message, UserError, _
from jetson_ft.export import gguf, merge
from jetson_ft.export.llama import LlamaServer, find_program
from jetson_ft.export.quantize import quantize_file
from jetson_ft.files import (
    cache_dir,
    cached_sha256,
    disk_errors,
    expand_user,
    remove_abandoned,
    staging_folder,
)
from jetson_ft.hardware import detect
from jetson_ft.models import files
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.runs import exports, store
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.store import Run
from jetson_ft.serve.engine import EngineProcess
from jetson_ft.serve.transformers_process import TransformersServer

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
_VERSION = 1  # of the cached bases; increase when an export makes them in another way
_PROCESS_BYTES = 400 * 2**20  # of llama.cpp's server, without weights and KV cache
_LABEL = re.compile(r"\d{8}-\d{6}-(.+)")  # of a run's name

Report = Callable[[str], None]  # shows a line of progress


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name."""

    name: str
    aliases: tuple[str, ...] = ()
    engine: str = "llama.cpp"
    created: int = 0  # seconds since 1970
    engine_fields: dict[str, Any] = field(default_factory=dict)  # that choose it

    def as_json(self, context: int) -> dict[str, Any]:
        """Return its entry of /v1/models; the last three fields are ours."""
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "jetson-ft",
            "aliases": list(self.aliases), "engine": self.engine, "context_length": context,
        }  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """All that a server needs: its models, and the process that generates (not started)."""

    models: list[ServedModel]
    process: EngineProcess
    context: int  # tokens of prompt and reply of a request
    notes: list[str] = field(default_factory=list)  # for the person who starts it


@dataclass(frozen=True)
class EngineSettings:
    """How the engine is started."""

    file_type: str = "f16"  # of GGUF files that are made
    context: int = 4096  # at most; the model's own limit may be lower
    parallel: int = 4  # replies at a time


def prepare(names: Sequence[str], root: Path, settings: EngineSettings, report: Report) -> Serving:
    """Return what the names stand for, with the files that it needs.

    Args:
        names: runs with one base (`latest`: the newest with an adapter), or a single model or GGUF
            file.
        root: the folder of the runs.

    Raises:
        UserError: an unknown name, runs that can't be served together, too little memory beside a
            training run, or a file that can't be made.
    """
    exports.check_options("gguf", [settings.file_type], "bf16")
    path = expand_user(names[0])
    if len(names) == 1 and path.suffix == ".gguf" and path.is_file():
        find_program()
        return _llama([ServedModel(path.stem, ("base",))], path, {}, settings)
    models = [name for name in names if files.is_base_model(name)]
    if models and len(names) > 1:
        raise UserError(
            _("A model can't be named beside runs: {models}."),
            fix=_("Name the runs alone; their base is served with them, as `base`."),
            models=", ".join(models),
        )
    if models:
        name = "embedded" if names[0] == "base" else names[0]
        return _serve_base(name, root, settings, report)
    runs = list({run.path: run for run in (_find_run(name, root) for name in names)}.values())
    return _serve_runs(runs, root, settings, report)


def _find_run(name: str, root: Path) -> Run:
    if name == "latest":
        for run in store.runs_with_adapter(root):
            return run
    return store.find_run(name, root)


def _serve_base(name: str, root: Path, settings: EngineSettings, report: Report) -> Serving:
    base, folder = files.resolve_model(name), expand_user(name)
    # Clients need not know where it is on this machine.
    model = ServedModel("base", (folder.resolve().name if folder.exists() else name,))
    find_program()
    if base.gguf_file:
        return _llama([model], base.folder / base.gguf_file, {}, settings)
    _require_memory(sum(path.stat().st_size for path in base.weight_files()))
    if not _base_path(base, base.folder, settings).is_file():
        try:
            gguf.require_expressible(base, base.folder, "gguf")
        except UserError as error:
            return _transformers(
                name, root, [replace(model, engine="transformers")], settings, error
            )
    return _llama([model], _base_gguf(base, base.folder, settings, report), {}, settings)


def _serve_runs(
    runs: Sequence[Run], root: Path, settings: EngineSettings, report: Report
) -> Serving:
    """Serve the runs' adapters beside their base, or a single run's in another way."""
    adapters = [run.require_adapter() for run in runs]
    base = files.resolve_model(runs[0].recipe().model)
    for run in runs[1:]:
        _require_same_base(run, base)
    find_program()
    models = [
        ServedModel(run.name, aliases, created=int(run.state().created))
        for run, aliases in zip(runs, _labels(runs), strict=True)
    ]
    _require_memory(sum(path.stat().st_size for path in base.weight_files()))
    try:
        _require_side_by_side(base, runs, adapters)
    except UserError as error:
        if len(runs) > 1:
            fix = Message(_("Serve the runs one at a time."))
            raise error.with_fix(fix) from error
        reason = error
    else:
        file = _base_gguf(base, adapters[0], settings, report)
        loras = {run.name: _export(run, "lora", settings, report) for run in runs}
        ids = {run.name: number for number, run in enumerate(runs)}
        models.append(ServedModel("base"))
        models = [replace(each, engine_fields=_lora_fields(ids, each.name)) for each in models]
        return _llama(models, file, loras, settings)
    try:
        gguf.require_expressible(base, adapters[0], "gguf")
    except UserError as error:
        models.append(ServedModel("base"))
        models = [
            replace(
                each,
                engine="transformers",
                engine_fields=_lora_fields({runs[0].name: 0}, each.name),
            )
            for each in models
        ]
        return _transformers(str(runs[0].path), root, models, settings, error)
    file = _export(runs[0], "gguf", settings, report)
    serving = _llama(models, file, {}, settings)
    serving.notes.append(
        f"The adapter is merged into its base, which is not served by itself: {reason.what}"
    )
    return serving


def _lora_fields(ids: dict[str, int], name: str) -> dict[str, Any]:
    """Return the engine's fields that apply the adapter of that name, of the base none."""
    scales = [{"id": number, "scale": float(each == name)} for each, number in ids.items()]
    return {"lora": scales}


def _labels(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Return each run's label, where no other has the same and no run is called so."""
    labels = [match[1] if (match := _LABEL.fullmatch(run.name)) else "" for run in runs]
    counts = Counter([*labels, *(run.name for run in runs), "base", ""])
    return [(label,) if counts[label] == 1 else () for label in labels]


def _require_same_base(run: Run, base: BaseModelFiles) -> None:
    other = files.resolve_model(run.recipe().model)
    if other.fingerprint() != base.fingerprint():
        raise UserError(
            _("The runs have different bases: {base} and {other}."), str(run.path),
            _("Start one server for each base, with another --port."),
            base=base.name, other=other.name,
        )  # fmt: skip


def _require_side_by_side(
    base: BaseModelFiles, runs: Sequence[Run], adapters: Sequence[Path]
) -> None:
    """Raise `UserError` if the adapters can't be used as LoRA files beside one GGUF of the base.

    That file has the tokenizer and the chat template for all of them.
    """
    if base.gguf_file:
        raise UserError(_("The base is a GGUF file."), str(base.folder / base.gguf_file))
    digests = [_tokenizer_digest(adapter) for adapter in adapters]
    for run, adapter, digest in zip(runs, adapters, digests, strict=True):
        if _made_export(run, "lora") is None:
            gguf.require_expressible(base, adapter, "lora")
        if digest != digests[0]:
            raise UserError(
                _("{run} has another tokenizer or chat template than {other}."), str(run.path),
                run=run.name, other=runs[0].name,
            )  # fmt: skip


def _tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in (folder / name for name in _TOKENIZER_FILES):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _base_path(base: BaseModelFiles, tokenizer: Path, settings: EngineSettings) -> Path:
    """Return where the base is as GGUF, with the tokenizer of a folder.

    It is in the cache, by what it is made of: all runs with that base and tokenizer use it.
    """
    made_of = f"{_VERSION} {base.fingerprint()} {_tokenizer_digest(tokenizer)}"
    digest = hashlib.sha256(made_of.encode())
    return cache_dir("gguf") / f"{digest.hexdigest()[:24]}-{settings.file_type}.gguf"


def _base_gguf(
    base: BaseModelFiles, tokenizer: Path, settings: EngineSettings, report: Report
) -> Path:
    """Return the file at `_base_path`; make it on first use."""
    path = _base_path(base, tokenizer, settings)
    with disk_errors(path), open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():  # perhaps another process has just made it
            return path
        report(f"converting {base.name} to GGUF ({settings.file_type}) for {path}")
        remove_abandoned(path.parent)
        with staging_folder(path) as staging:
            # As an export makes it, so that adapters are served on what they were checked on.
            model, made = staging / "model", staging / "f16.gguf"
            merge.merge_adapter(base, tokenizer, model, "fp16", apply=False)
            gguf.convert_model(model, made, "f16", name=Path(base.name).name)
            if settings.file_type != "f16":
                quantize_file(made, staging / path.name, settings.file_type)
                made = staging / path.name
            made.replace(path)
    return path


def _made_export(run: Run, name: str) -> Path | None:
    """Return the GGUF file of a run's export; None: missing, damaged, or of another adapter."""
    with suppress(DamagedRun, KeyError, TypeError):  # of a file that says nothing of the adapter
        export = exports.find_export(run, name) or {"files": []}
        for file in export["files"]:
            path = run.path / exports.FOLDER / name / Path(file["name"]).name
            if path.suffix == ".gguf" and path.is_file():
                weights = cached_sha256(run.adapter / WEIGHTS_FILE)
                return path if export["adapter"]["sha256"] == weights else None
    return None


def _export(run: Run, kind: str, settings: EngineSettings, report: Report) -> Path:
    """Return the GGUF file of a run's export; make it on first use."""
    name = exports.export_name(kind, settings.file_type)
    if file := _made_export(run, name):
        return file
    parts: set[str] = set()

    def progress(part: str, done: int, total: int) -> None:
        if part not in parts:
            parts.add(part)
            report(f"{run.name}, export {name}: {part}")

    exports.make_export(run, kind, quantize=[settings.file_type], on_progress=progress)
    file = _made_export(run, name)
    assert file, "it was made above, of this adapter"
    return file


def _llama(
    models: list[ServedModel], file: Path, loras: dict[str, Path], settings: EngineSettings
) -> Serving:
    context, kv_bytes = gguf.read_limits(file)
    context = min(context, settings.context)
    sizes = [path.stat().st_size for path in (file, *loras.values())]
    _require_memory(sum(sizes) + kv_bytes * context * settings.parallel + _PROCESS_BYTES)
    process = LlamaServer(file, loras, n_ctx=context, n_parallel=settings.parallel)
    return Serving(models, process, context)


def _transformers(
    name: str, root: Path, models: list[ServedModel], settings: EngineSettings, reason: UserError
) -> Serving:
    """Serve with transformers, and say why."""
    note = f"transformers answers, one request at a time: {reason.what}"
    process = TransformersServer(name, root, settings.context)
    return Serving(models, process, settings.context, [note])


def _require_memory(needed: int) -> None:
    device = detect.detect_cpu()
    memory_guard.require_free(needed, device)
    if needed > device.memory_available:
        raise UserError(
            _("Too little memory: the server needs {needed:.1f} GiB, {free:.1f} GiB are free."),
            fix=_("End other programs, or take a smaller --quantize, --context or --parallel."),
            needed=needed / 2**30, free=device.memory_available / 2**30,
        )  # fmt: skip
