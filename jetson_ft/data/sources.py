"""Find the files of a data source: a bundled set, a file, or a data set on the Hub."""

from __future__ import annotations

import difflib
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jetson_ft import hub
from jetson_ft.data.readers import SUFFIXES
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_errors, expand_user, refuse_special

_BUNDLED = Path(__file__).with_name("bundled")


class BundledSet(NamedTuple):
    """Chinese rows that come with the program; no row is in both files."""

    train: Path
    heldout: Path
    heldout_rows: int


# By the name that `data.train` and `data.heldout` take.
BUNDLED = {
    "bundled": BundledSet(_BUNDLED / "zh_train.jsonl", _BUNDLED / "zh_heldout.jsonl", 66),
    "bundled-short": BundledSet(
        _BUNDLED / "zh_short_train.jsonl", _BUNDLED / "zh_short_heldout.jsonl", 100
    ),
}

_SUFFIXES = ", ".join(SUFFIXES)
_NOT_ROWS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_SHOWN_FILES = 20


@dataclass(frozen=True)
class Source:
    """A name that a recipe has as data, and its files."""

    name: str
    files: tuple[Path, ...]


def resolve_source(name: str) -> Source:
    """Return the files of a bundled set, a path, or `owner/name[/file]` on the Hub (downloaded).

    Raises:
        UserError: not found, or the data set has no file or several files that could be meant.
    """
    if name in BUNDLED:
        return Source(name, (BUNDLED[name].train,))
    path = expand_user(name)
    refuse_special(path)
    with disk_errors(path):
        if path.is_file():
            return Source(name, (path,))
        owner, _slash, rest = name.partition("/")
        title, _slash, inside = rest.partition("/")
        repo = f"{owner}/{title}"
        is_path = Path(owner).is_dir() if inside else title.endswith(SUFFIXES)
        if hub.REPO_ID.fullmatch(repo) and not is_path and not path.exists():
            names = hub.list_files(repo, "dataset")
            chosen = [inside] if inside in names else _training_files(repo, inside, names)
            folder = hub.fetch(repo, "dataset", [glob.escape(file) for file in chosen])
            return Source(name, tuple(folder / file for file in chosen))
        raise _not_found(path)


def _not_found(path: Path) -> UserError:
    folder = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    choices = Message(
        _("`data.train` takes {bundled}, a file ({suffixes}) or a Hub data set id (`owner/name`)."),
        {"bundled": ", ".join(f"`{name}`" for name in BUNDLED), "suffixes": _SUFFIXES},
    )
    if path.is_dir():
        what = _("This is a folder, not a data file.")
        if files := ", ".join(name for name in names if name.endswith(SUFFIXES)):
            choices = Message(_("Choose a data file in it ({files})."), {"files": files})
    else:
        what = _("Data file not found.")
        if near := difflib.get_close_matches(path.name, names, 1):
            values = {"path": str(folder / near[0]), "choices": choices}
            choices = Message(_("Did you mean `{path}`? {choices}"), values)
    return UserError(what, str(path), choices)


def _training_files(repo: str, inside: str, names: list[str]) -> list[str]:
    """Return the one file that has the rows, or its numbered parts."""
    data = [name for name in names if name.endswith(SUFFIXES) and Path(name).name not in _NOT_ROWS]
    for seldom in (".txt", ".zip"):  # often about the data, and of pictures
        data = [name for name in data if not name.endswith(seldom)] or data
    training = [name for name in data if re.search(r"(?<![a-z])train", name.lower())] or data
    wholes = {re.sub(r"\d+-of-\d+", "", name) for name in training}
    if len(wholes) == 1 and not inside:
        return sorted(training)
    if not data:
        raise UserError(
            _("Data set {repo!r} has no file of a supported type ({suffixes})."),
            repo,
            _("Download and convert it, then use the file's path."),
            repo=repo,
            suffixes=_SUFFIXES,
        )
    files: Message | str = ", ".join(data[:_SHOWN_FILES])
    if len(data) > _SHOWN_FILES:
        values = {"files": files, "count": len(data) - _SHOWN_FILES}
        files = Message(_("{files} and {count} more"), values)
    raise UserError(
        _("File {inside!r} not found in this data set. Its files: {files}.")
        if inside
        else _("Data set {repo!r} has several files: {files}."),
        repo,
        _("Choose one, as in `data.train: {repo}/FILE`."),
        repo=repo,
        inside=inside,
        files=files,
    )
