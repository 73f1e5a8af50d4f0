"""What the page shows of a finished run's exports and jobs, and the commands that it starts."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.export import modelfile
from jetson_ft.export.gguf import FILE_TYPES
from jetson_ft.i18n import duration
from jetson_ft.runs import exports, jobs, monitor
from jetson_ft.runs.jobs import Job, Progress
from jetson_ft.runs.store import Run

# Group of the form -> exports by name, each with its title and what it is for. The first one is
# chosen at first: f16 gives the same answers as the adapter. Small models lose more by rounding:
# their q8_0 may not pass the check.
CHOICES = {
    _("For Ollama and llama.cpp"): {
        "gguf-f16": ("GGUF f16", _("the same answers")),
        "gguf-q8_0": ("GGUF q8_0", _("half the size of f16, nearly the same answers")),
        "gguf-q4_k_m": ("GGUF q4_k_m", _("less than a third of f16, small loss")),
        "gguf-q4_0": ("GGUF q4_0", _("less than a third of f16, for old readers")),
        "lora": (_("Adapter as GGUF"), _("small; used beside a GGUF of the base")),
    },
    _("For transformers and vLLM"): {
        "merged": (_("Merged model"), _("safetensors of base and adapter together")),
    },
}
_TITLES = {name: title for group in CHOICES.values() for name, (title, _use) in group.items()}
_LOG_BYTES = 4000
_MAX_TEXT = 100  # characters of the name of a part of the work
_FIRST_PORT, _LAST_PORT = 8000, 8099


@dataclass(frozen=True)
class JobView:
    """A job as it is drawn."""

    job: Job
    progress: Progress | None
    log: str


@dataclass(frozen=True)
class AfterTraining:
    """What is drawn below a run that has an adapter."""

    exports: list[dict[str, Any]]  # of `exports.list_exports`, the largest file first
    jobs: dict[str, JobView]  # by the job's name; without those that never ran
    faults: list[UserError]  # of damaged files

    @classmethod
    def read(cls, run: Run) -> AfterTraining | None:
        """Return the state of the run's exports and jobs; None: the run has no adapter."""
        if not run.has_adapter():
            return None
        views: dict[str, JobView] = {}
        faults: list[UserError] = []
        for name in jobs.NAMES:
            try:
                if job := jobs.read(run, name):
                    log = monitor.log_tail(jobs.job_folder(run, name), _LOG_BYTES)
                    views[name] = JobView(job, jobs.read_progress(run, name), log)
            except UserError as error:
                faults.append(error)
        return cls([_with_files(export) for export in exports.list_exports(run)], views, faults)


def _with_files(export: dict[str, Any]) -> dict[str, Any]:
    """Return the export with its files that have a name and a size, the largest one first."""
    files = [
        file
        for file in export["files"]
        if isinstance(file.get("name"), str) and isinstance(file.get("bytes"), int)
    ]
    return {**export, "files": sorted(files, key=lambda file: -file["bytes"])}


def export_arguments(run: Run, choice: str, unchecked: bool = False) -> list[str]:
    """Return the arguments of `jetson-ft` that make an export.

    Args:
        choice: the name of an export in `CHOICES`.
        unchecked: keep the result without comparing it with the adapter.

    Raises:
        UserError: it is none.
    """
    if choice not in _TITLES:
        raise UserError(_("Choose one of: {names}."), "choice", names=", ".join(_TITLES))
    kind, _dash, file_type = choice.partition("-")
    quantize = ["--quantize", file_type] if file_type else []
    check = ["--no-check"] if unchecked else []
    return ["export", str(run.path), "--format", kind, *quantize, *check, "--json"]


def is_in_container() -> bool:
    """Return whether the page is the image's: a program outside reaches the page's port only."""
    return bool(os.environ.get("JETSON_FT_REACHED_AS"))  # set by the image


def serve_arguments(run: Run) -> list[str]:
    """Return the arguments of `jetson-ft` that serve a run on this machine, at a free port.

    Raises:
        UserError: no port is free, or no other program could reach it.
    """
    if is_in_container():
        raise UserError(
            _("A program outside of the page's container can't reach a server in it."),
            str(run.path),
            _("Start a container for it: `docker/run.sh serve {run}`."),
            run=run.name,
        )
    for port in range(_FIRST_PORT, _LAST_PORT + 1):
        with suppress(OSError), socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            # The environment may name the page's host and address.
            where = ["--host", "127.0.0.1", "--reached-as", "", "--port", str(port)]
            return ["serve", str(run.path), *where, "--json"]
    raise UserError(
        _("All ports from {first} to {last} are in use."),
        "127.0.0.1",
        _("End one of the programs that use them."),
        first=_FIRST_PORT,
        last=_LAST_PORT,
    )


def export_file(run: Run, export: str, file: str) -> Path:
    """Return the path of a file of an export.

    Raises:
        UserError: no export of the run has such a file.
    """
    for made in exports.list_exports(run):
        names = [each.get("name") for each in made["files"]]
        if made["name"] == export and file in names and "/" not in file:
            path = Path(made["path"]) / file
            if path.is_file() and not path.is_symlink():  # which would lead out of the folder
                return path
    raise UserError(_("File not found."), f"{run.name}/{export}/{file}")


def describe_progress(progress: Progress) -> dict[str, Any]:
    """Return the `part` of the work, its `share` in percent, the time `left` (None: unknown)."""
    share = None
    if progress.total and progress.total > 0:
        share = min(100.0, max(0.0, 100.0 * progress.done / progress.total))
    left = progress.seconds_left(time.time())
    # A text of the catalogues, in which the type of a file takes the place of `{type}`.
    words = progress.what[:_MAX_TEXT].replace("{", "(").replace("}", ")").split(" ")
    types = [word for word in words if word in (*FILE_TYPES, "lora")]
    template = " ".join("{type}" if word in types else word for word in words)
    return {
        "part": Message(template, {"type": types[0] if types else ""}),
        "share": share,
        "left": None if left is None else duration(left),
    }


def describe_check(export: dict[str, Any]) -> tuple[Message, bool]:
    """Return what the check of an export measured, and whether there was one."""
    check = export["check"]
    parts = []
    with suppress(KeyError, TypeError, ValueError):
        if check.get("checked") is False:
            return Message(_("not checked")), False
        if check.get("prompts") == 0:
            parts.append(Message(_("no text compared")))
        elif "prompts" in check:
            counts = {"same": int(check["same_text"]), "prompts": int(check["prompts"])}
            parts.append(Message(_("same text {same}/{prompts}"), counts))
        if "bits_per_character" in check:
            bits = {
                name: float(check["bits_per_character"][name]) for name in ("adapter", "export")
            }
            parts.append(Message(_("{adapter:.3f} → {export:.3f} bits per character"), bits))
        if "logits" in check:
            measured = check["logits"]
            counts = {"same": int(measured["same_token"]), "count": int(measured["positions"])}
            parts.append(Message(_("same next token {same}/{count}"), counts))
            largest = {"value": float(measured["largest"])}
            parts.append(Message(_("largest difference of logits {value:.2g}"), largest))
        if parts:
            return joined(parts, " · "), True
    return Message(_("not checked")), False


def describe_name(export: dict[str, Any]) -> str:
    """Return an export's title in the form, else its name; a template."""
    name = str(export["name"])
    return _TITLES.get(name, name.replace("{", "(").replace("}", ")"))


def ollama_command(run: Run, export: dict[str, Any]) -> str:
    """Return the command that makes an Ollama model of an export; empty where none can be made."""
    if not any(file.get("name") == modelfile.FILE for file in export["files"]):
        return ""
    return modelfile.ollama_command(run.name, Path(export["path"]))


def describe_server(served: dict[str, Any], text: str) -> dict[str, str] | None:
    """Return a server's `url`, its `key` (may be empty), and the `curl` command of a request.

    Args:
        served: what `jetson-ft serve --json` prints once it is ready; empty before: None.
        text: the message to send.
    """
    try:
        url, model, key = str(served["url"]), served["models"][0], str(served.get("api_key") or "")
    except (KeyError, IndexError, TypeError):
        return None
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    words = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
    words += ["-H", f"Authorization: Bearer {key}"] if key else []
    curl = shlex.join([*words, "-d", json.dumps(body, ensure_ascii=False)])
    return {"url": url, "key": key, "curl": curl}


def size_text(size: int) -> Message:
    """Return a file's size in bytes as text, in decimal units."""
    if size >= 10**9:
        return Message(_("{size:,.2f} GB"), {"size": size / 10**9})
    if size >= 10**6:
        return Message(_("{size:,.1f} MB"), {"size": size / 10**6})
    return Message(_("{size:,.1f} KB"), {"size": max(size, 100) / 10**3})
