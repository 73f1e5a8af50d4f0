"""Publish a finished run's adapter or one of its exports on the model hub.

`plan_push` says what would be sent and where; `push` sends it. Only files of known names are sent,
and no path of this machine: an adapter's files and an export's own contain some.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft import hub
from jetson_ft.adapter import BASE_FILE
from jetson_ft.errors import UserError, _
from jetson_ft.files import read_json
from jetson_ft.hub import UploadTarget
from jetson_ft.runs import exports
from jetson_ft.runs.contents import read_bytes
from jetson_ft.runs.report import card
from jetson_ft.runs.store import Run

ADAPTER = "adapter"
_SETTINGS = re.compile(
    r"(?:config|generation_config|adapter_config|tokenizer_config|special_tokens_map|added_tokens"
    r"|processor_config|export|check|base)\.json"
)
_WHOLE = re.compile(
    r"[A-Za-z0-9][\w.-]*\.(?:safetensors|safetensors\.index\.json|gguf|jinja)"
    r"|tokenizer\.json|tokenizer\.model|vocab\.json|vocab\.txt|merges\.txt|README\.md|Modelfile"
)
_TEXTS = (".md", ".json", "Modelfile")  # ends of the names of files that people wrote or may edit
_VOCABULARIES = ("tokenizer.json", "vocab.json")  # any text can be a token
_PATH = re.compile(r"[/~][^\n]*/[^\n]*")  # a JSON text that is a path
_STUB = "[More Information Needed]"  # in the card that PEFT writes


@dataclass(frozen=True)
class PushPlan:
    """What would be sent, and where."""

    run: Run
    what: str  # `adapter`, or the export's name
    target: UploadTarget
    private: bool
    files: dict[str, Path | bytes]  # by name; the content of a file that is changed for it
    left_out: list[str]  # names of files in the folder that are not sent
    quotes_rows: bool  # whether the card quotes rows of the data

    @property
    def address(self) -> str:
        return f"{hub.endpoint()}/{self.target.repo}"

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def plan_push(run: Run, repo: str, what: str = ADAPTER, public: bool = False) -> PushPlan:
    """Return what would be sent to a repository on the Hub; send nothing of it.

    Args:
        repo: `OWNER/NAME`.
        what: `adapter`, or the name of an export or of its kind.
        public: everyone may see a repository that is made.

    Raises:
        UserError: the run has no such files, one of them names a folder of this machine, the Hub
            can't be reached or used, or the repository is public and `public` isn't set.
    """
    adapter_dir = exports.require_finished(run)
    folder = adapter_dir if what == ADAPTER else _export_folder(run, what)
    files, left_out = _public_files(run, folder)
    _refuse_paths(run, folder, files)
    target = hub.upload_target(repo)
    if target.is_private is False and not public:
        raise UserError(
            _("{repo} exists and is public: everyone would see the files."),
            f"{hub.endpoint()}/{repo}",
            _("Choose another name, make it private on that page, or add --public."),
            repo=repo,
        )
    readme = files.get(card.FILE, b"")
    text = readme if isinstance(readme, bytes) else read_bytes(readme)
    return PushPlan(
        run=run,
        what=folder.name,
        target=target,
        private=not public if target.is_private is None else target.is_private,
        files=files,
        left_out=left_out,
        quotes_rows=b"\n## Samples\n" in text,
    )


def push(plan: PushPlan) -> str:
    """Send the plan's files in one commit; return the address of the repository.

    A call that was interrupted can be repeated: what was sent is not sent again.
    """
    message = f"Add the {plan.what} of {plan.run.name}"
    hub.upload(plan.target, plan.files, plan.private, message)
    return plan.address


def _export_folder(run: Run, what: str) -> Path:
    """Return the folder of the export with that name, or of the only one of that kind."""
    folder = run.path / exports.FOLDER
    names = sorted(path.parent.name for path in folder.glob("[!.]*/export.json"))
    chosen = [name for name in names if name == what] or [
        name for name in names if name.startswith(f"{what}-")
    ]
    if len(chosen) == 1:
        return folder / chosen[0]
    text = _("{run} has no export {name!r}.")
    fix = _("Make it (`jetson-ft export`), or name one of: {names}.")
    if chosen:
        text, fix = _("{run} has several exports of that kind."), _("Name one: {names}.")
    listed = ", ".join(chosen or [ADAPTER, *names])
    raise UserError(text, str(run.path), fix, run=run.name, name=what, names=listed)


def _public_files(run: Run, folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
    """Return the files to send, and the names of those that are not sent."""
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            left_out.append(path.name)
        elif _SETTINGS.fullmatch(path.name):
            files[path.name] = _public_settings(run, path)
        elif path.name == card.FILE and _STUB.encode() in read_bytes(path):
            files[path.name] = card.model_card(run).encode()
        elif _WHOLE.fullmatch(path.name):
            files[path.name] = path
        else:
            left_out.append(path.name)
    return files, left_out


def _public_settings(run: Run, path: Path) -> Path | bytes:
    """Return the file, or its content with names in the place of paths."""
    original = read_json(path)
    public = _without_paths(original)
    model = run.recipe().model
    if path.name == "adapter_config.json":
        public["base_model_name_or_path"] = card.public_base(model)
    elif path.name == BASE_FILE:
        # Its name is what `jetson-ft` loads: `embedded` is no model of the Hub.
        name = model if model == "embedded" else card.public_base(model)
        public = {"name": name, "fingerprint": original["fingerprint"]}
    if public == original:
        return path
    return (json.dumps(public, ensure_ascii=False, indent=2) + "\n").encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.fullmatch(value):
        return Path(value).name
    return value


def _refuse_paths(run: Run, folder: Path, files: dict[str, Path | bytes]) -> None:
    """Raise a `UserError` if a text that is sent has the path of a folder of this machine."""
    stored = run.adapter / BASE_FILE
    base = [str(read_json(stored).get("folder", ""))] if stored.is_file() else []
    paths = [str(run.path), f"{Path.home()}/", *base]
    for name, content in files.items():
        if name.endswith(_TEXTS) and name not in _VOCABULARIES:
            text = content if isinstance(content, bytes) else read_bytes(content)
            for path in filter(None, paths):
                if path.encode() in text:
                    raise UserError(
                        _("A file that would be published names a folder of this machine: {path}"),
                        str(folder / name),
                        _("Remove that from the file."),
                        path=path,
                    )
