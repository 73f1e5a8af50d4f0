"""Files that clients of the page upload: `uploads` in the folder of runs, closed to other users.

A file that is being received is in `uploads/incoming-…`, a folder of the server's process. The form
moves it to a folder of its own, `uploads/XXXXXXXX`, where it stays while the recipe of a run beside
it names it. Runs of another folder don't count: copy such a file first.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors, existing_parent, printable

_INCOMING = "incoming-"
_STORED = re.compile(r"[0-9a-f]{8}")
_NAME_BYTES = 200  # file systems allow 255
_SWEEP_SECONDS = 3600.0  # between two sweeps; age of a received file that no form has taken
_UNUSED_SECONDS = 24 * 3600.0  # age of a stored file that no run names


class Incoming:
    """The folder in which this process receives uploads."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs.absolute()
        self.folder = _uploads(self.runs) / f"{_INCOMING}{secrets.token_hex(8)}"
        self._handle: int | None = None  # of the folder, locked: other servers leave it alone
        self._receiving: list[int] = []  # the bytes that each upload may take
        self._lock = threading.Lock()
        self._swept_at = float("-inf")
        self.refusal: UserError | None = None  # why this process receives none at all

    def prepare(self) -> None:
        """Create the folder and sweep what nothing uses; call it before each upload.

        Raises:
            UserError: it can't be made, or another user could read or replace what is in it.
        """
        if self.refusal:
            raise self.refusal
        with self._lock, disk_errors(self.folder):
            _make_private(self.folder.parent)
            if not self.folder.is_dir() or self._handle is None:
                _make_private(self.folder)
                if self._handle is not None:  # the folder was removed
                    os.close(self._handle)
                self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.monotonic() - self._swept_at > _SWEEP_SECONDS:
                self._swept_at = time.monotonic()
                self._sweep()

    def free_bytes(self) -> int:
        """Return how much one more upload may take: half of what others leave of the free space.

        What others have sent already counts twice, on the safe side.
        """
        free = shutil.disk_usage(existing_parent(self.folder)).free
        return max(0, free - sum(self._receiving)) // 2

    @contextmanager
    def receiving(self, limit: int) -> Iterator[None]:
        """Count an upload of so many bytes; after the last, remove what aborted ones left."""
        self._receiving.append(limit)
        try:
            yield
        finally:
            self._receiving.remove(limit)
            if not self._receiving:
                # Gradio moves a file that is whole into a folder; the others have no owner now.
                for path in self.folder.glob("*"):
                    if not path.is_dir():
                        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove old received files, folders of servers that have ended, and unused files."""
        now = time.time()
        for path in self.folder.iterdir():
            if now - path.lstat().st_mtime > _SWEEP_SECONDS and not self._receiving:
                shutil.rmtree(path, ignore_errors=True)
        for folder in self.folder.parent.glob(f"{_INCOMING}*"):
            if folder != self.folder and not folder.is_symlink() and folder.is_dir():
                _remove_if_unlocked(folder)
        _sweep_stored(self.runs)


def store(runs: Path, source: Path) -> Path:
    """Move a received file to a folder of its own; return its path there.

    Raises:
        UserError: it can't be moved, or it is not a file.
    """
    folder = _uploads(runs) / secrets.token_hex(4)
    with disk_errors(folder):
        _make_private(folder.parent)
        folder.mkdir(mode=0o700)
    target = folder / safe_file_name(source.name)
    try:
        with disk_errors(source):
            if not stat.S_ISREG(source.lstat().st_mode):
                raise UserError(_("This is not a file."), str(source), _("Upload it again."))
            shutil.move(source, target)
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def _sweep_stored(runs: Path) -> None:
    """Remove the stored files that no run names, a day after they came."""
    stored = [path for path in _uploads(runs).glob("*") if _STORED.fullmatch(path.name)]
    old = [path for path in stored if time.time() - path.lstat().st_mtime > _UNUSED_SECONDS]
    if not old:
        return
    recipes = []
    for recipe in runs.glob("*/recipe.yaml"):
        try:
            recipes.append(recipe.read_bytes())
        except OSError:  # it may name any of them
            return
    for folder in old:
        if not any(folder.name.encode() in recipe for recipe in recipes):
            shutil.rmtree(folder, ignore_errors=True)


def safe_file_name(name: str) -> str:
    """Return the last part of a file's name, without what is special in a path or on a terminal.

    Letters of all scripts stay, and so do the suffixes, which say what is in the file.
    """
    name = re.split(r"[/\\]", name.encode(errors="replace").decode())[-1]
    name = "".join(letter if printable(letter) == letter else "_" for letter in name)
    name = re.sub(r"\s", " ", name).strip().lstrip("-.~ ")
    suffix = "".join(Path(name).suffixes[-2:]) if name else ""
    if len(suffix.encode()) > 20:
        suffix = ""
    stem = name[: len(name) - len(suffix)]
    while len((stem + suffix).encode()) > _NAME_BYTES:
        stem = stem[:-1]
    return f"{stem or 'upload'}{suffix}"


def _uploads(runs: Path) -> Path:
    return runs.absolute() / "uploads"


def _make_private(folder: Path) -> None:
    """Create a folder that its owner alone can open; refuse one that is another user's or a link.

    Raises:
        OSError: it can't be created.
        UserError: it is not a folder of this user.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid():
        raise UserError(
            _("Uploads are refused: their folder is a link, or belongs to another user."),
            str(folder),
            _("Remove it, or move it away; the page makes a new one."),
        )
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(20, "Not a directory", str(folder))
    with suppress(OSError):  # a file system without modes
        folder.chmod(0o700)


def _remove_if_unlocked(folder: Path) -> None:
    """Remove the folder of a server that has ended."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
