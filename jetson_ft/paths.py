"""Names and files: where things are kept, and writes that are whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jetson_ft.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Terminal escapes; marks that reverse the direction of writing; halves of surrogate pairs (a
# file name that is no UTF-8), which can't be printed at all.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def cache_dir(*parts: str) -> Path:
    """A folder for what can be made again, below `cache_root`. Created."""
    folder = cache_root().joinpath(*parts)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_root() -> Path:
    """`$JETSON_FT_CACHE`, else XDG's cache."""
    base = os.environ.get("JETSON_FT_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jetson-ft")


def safe_name(name: str) -> str:
    """The name itself when it can be a folder's name without surprises, else a `UserError`."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{printable(name)!r} is not a usable name.",
            fix="Use letters, digits, dots, dashes and underscores, starting with a letter "
            "or a digit, 100 characters at most.",
        )
    return name


def printable(text: str) -> str:
    """The text with control characters (terminal escapes among them) made visible."""
    return _CONTROL.sub(lambda found: _escape(ord(found.group())), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals about `path` into messages a person can use."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> UserError:
    """The plain message for an `OSError` met while reading or writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing_parent(path)).free
        return UserError(
            f"The disk is full ({free / 2**20:,.0f} MiB free).",
            str(path),
            "Make room, or choose another disk (`--set output=FOLDER` for runs, "
            "JETSON_FT_CACHE and HF_HOME for caches).",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            "This place can't be written or read.",
            str(path),
            "Choose a folder of your own, or change its owner (`ls -ld` shows who owns it).",
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UserError("A file stands where a folder is needed.", str(path), "Move it away.")
    if error.errno == errno.ENOENT:
        return UserError(
            "There is no such file or folder.", str(path), "Check the path; it is relative to here."
        )
    what = f"The system refuses it: {error.strerror or error}."
    return UserError(what, str(path), "Check the path and the disk.")


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def staged(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole and on the disk, or never."""
    with disk_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the file whole: a reader, or a power cut, sees the old content or the new."""
    with staged(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _umask() -> int:
    # mkstemp makes files private; the process's own wish can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as readable JSON (NaN is refused: it is not JSON)."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The parsed file, or a `UserError` that names it."""
    with disk_errors(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"This file is not valid JSON: {error}.", str(path), "Put an intact copy in its place."
        ) from error


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with disk_errors(path), open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
