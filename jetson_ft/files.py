"""Safe names, the cache's folder, atomic writes, plain messages for disk errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from jetson_ft.errors import Message, UserError, _

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Libraries raise errors of their own types about a full disk, safetensors with a number.
_FULL_TEXT = re.compile(r"os error (?:28|122)\b|No space left on device|Disk quota exceeded")
_STAGED_SECONDS = 2.0  # after which a file that is being written is locked, or left behind
# Terminal escapes; separators of lines and paragraphs; marks of direction and other invisible
# characters, tags among them, that can disguise a text; halves of surrogate pairs (from a file name
# that is not UTF-8, or from JSON), which can't be encoded. Joiners of emoji and scripts stay.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def cache_dir(*parts: str) -> Path:
    """Return a folder below `cache_root` for what can be made again; create it."""
    folder = cache_root().joinpath(*parts)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_root() -> Path:
    """Return `$JETSON_FT_CACHE`, or else the folder below XDG's cache."""
    if folder := os.environ.get("JETSON_FT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jetson-ft")


def expand_user(text: str) -> Path:
    """Return the path, with the user's home folder in place of `~` or `~NAME` at its start.

    Raises:
        UserError: the user is unknown, or has no home folder.
    """
    try:
        # Unlike pathlib, it does not read `./~x` as `~x`.
        path = os.path.expanduser(text)  # noqa: PTH111
    except ValueError:  # a null character, or half a surrogate pair
        path = text
    if path.startswith("~"):
        raise UserError(
            _("The user in this path is unknown, or has no home folder."),
            text,
            _("Check the name after ~; if a file's own name begins with ~, write ./ before it."),
        )
    return Path(path)


def safe_name(name: str) -> str:
    """Return the name unchanged if it is safe as a folder's name.

    Raises:
        UserError: it could leave its folder, or be read as an option or an escape.
    """
    if _NAME.fullmatch(name):
        return name
    fix = _(
        "Use letters, digits, dots, dashes and underscores, starting with a letter or a digit, "
        "100 characters at most."
    )
    raise UserError(_("{name!r} is not a usable name."), fix=fix, name=printable(name))


def printable(text: str) -> str:
    """Return the text with control and invisible characters and half surrogate pairs escaped.

    Line breaks and tabs stay.
    """

    def escape(character: str) -> str:
        code = ord(character)
        if code < 0x100:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return replace_unprintable(text, escape)


def replace_unprintable(text: str, escape: Callable[[str], str]) -> str:
    """Return the text with each character that `printable` escapes replaced by `escape` of it."""
    return _CONTROL.sub(lambda match: escape(match.group()), text)


def quoted(text: str) -> str:
    """Return a text as one word of a shell command that is shown to be copied.

    Control characters are escaped as bash reads them (`$'\\x1b'`).
    """
    if printable(text) == text:
        return shlex.quote(text)

    def escape(character: str) -> str:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as `os.fsdecode` reads it
            code -= 0xDC00
        is_byte = code < 0x80 or code != ord(character)
        return f"\\x{code:02x}" if is_byte else f"\\U{code:08x}"

    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{replace_unprintable(escaped, escape)}'"


def printable_value(value: Any) -> Any:
    """Return a text as `printable` does, and any other value unchanged: `finalize` of Jinja.

    Text that is marked as HTML is unchanged too.
    """
    return printable(value) if type(value) is str else value


class DiskFull(UserError):
    """A file can't be written, because the disk is full or the user's quota is used up."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or an error that led to it, reports a full disk."""
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path: Path) -> DiskFull:
    """Return the message for a full disk, on which `path` is."""
    what = _("The disk is full ({free:,.0f} MiB free).")
    fix = _(
        "Free some space, or choose another disk (`--set output_dir=FOLDER` for runs, "
        "JETSON_FT_CACHE and HF_HOME for caches)."
    )
    free = shutil.disk_usage(existing_parent(path)).free / 2**20
    return DiskFull(what, str(path), fix, free=free)


def require_space(path: Path, needed: float, purpose: Message) -> None:
    """Raise `DiskFull` if the disk of `path` has less than `needed` bytes free for `purpose`."""
    free = shutil.disk_usage(existing_parent(path)).free
    if needed > free:
        raise DiskFull(
            _("The disk is full: {free:,.1f} MB are free, {purpose} needs {needed:,.1f} MB."),
            str(path),
            disk_full(path).fix,
            free=free / 10**6,
            needed=needed / 10**6,
            purpose=purpose,
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise operating system errors about `path` as a plain `UserError`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> UserError:
    """Return the plain message for an `OSError` met while reading or writing `path`."""
    code = error.errno
    if code in _FULL:
        return disk_full(path)
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = _("This file or folder can't be written or read.")
        fix = _("Choose a folder of your own, or change its owner (`ls -ld` shows who owns it).")
    elif code in (errno.EEXIST, errno.ENOTDIR):
        what, fix = _("Expected a folder, found a file."), _("Move the file away.")
    elif code == errno.ENOENT:
        what = _("File or folder not found.")
        fix = _("Check the path; it is relative to the current folder.")
    else:
        what = _("The operating system reports an error: {reason}.")
        fix = _("Check the path and the disk.")
    return UserError(what, str(path), fix, reason=str(error.strerror or error))


_SPECIAL = (
    (stat.S_ISFIFO, _("a pipe")),
    (stat.S_ISSOCK, _("a socket")),
    (stat.S_ISCHR, _("a device")),
    (stat.S_ISBLK, _("a device")),
)
_LIVE_FOLDERS = Path("/proc"), Path("/sys")


def refuse_special(path: Path) -> None:
    """Raise a `UserError` for what is no stored file; pass a file, a folder, and a missing path.

    To read a pipe or a device may block, or never end; some files of /proc and /sys do too.
    """
    with disk_errors(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: NUL in the name
            return
    kind = next((text for is_kind, text in _SPECIAL if is_kind(mode)), None)
    if any(folder in path.resolve().parents for folder in _LIVE_FOLDERS):
        kind = _("a part of the running system (/proc, /sys)")
    if kind:
        raise UserError(
            _("Expected a stored file, found {kind}."),
            str(path),
            _("Save the content as a file, and name that."),
            kind=Message(kind),
        )


def existing_parent(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def staged(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file; rename it to `path` once it is whole and on the disk."""
    with disk_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # for `remove_abandoned`
                yield file
                file.flush()
                os.fsync(file.fileno())
                # mkstemp makes files private; the umask can only be read by setting it.
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; remove it, with what is left in it, at the end."""
    with disk_errors(path):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # for `remove_abandoned`
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_abandoned(folder: Path) -> None:
    """Remove what `staged` and `staging_folder` left in the folder when their process was killed.

    Its lock shows that a process still writes.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process removes it too, or it is another user's
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime < _STAGED_SECONDS:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write the file so that a reader, or a power cut, sees the old content or the new."""
    with staged(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN raises ValueError, as it is not JSON."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the parsed file; one that is not JSON raises a `UserError`."""
    refuse_special(path)
    with disk_errors(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        what = _("This file is not valid JSON: {reason}.")
        fix = _("Replace it with an intact copy.")
        raise UserError(what, str(path), fix, reason=str(error)) from error


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with disk_errors(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """Return `sha256_file`, computed once until the file's size, time or inode changes."""
    with disk_errors(path):
        stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}"
    entry = cache_dir("data", "hashes") / hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    if entry.is_file() and len(cached := entry.read_text()) == 64:
        return cached
    digest = sha256_file(path)
    write_atomic(entry, digest)
    return digest
