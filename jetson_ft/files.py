"""Safe names, the cache's folder, atomic writes, plain messages for disk errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jetson_ft.errors import UserError, _

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
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
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped)}'"


def printable_value(value: Any) -> Any:
    """Return a text as `printable` does, and any other value unchanged: `finalize` of Jinja.

    Text that is marked as HTML is unchanged too.
    """
    return printable(value) if type(value) is str else value


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
    if code in (errno.ENOSPC, errno.EDQUOT):
        what = _("The disk is full ({free:,.0f} MiB free).")
        fix = _(
            "Free some space, or choose another disk (`--set output_dir=FOLDER` for runs, "
            "JETSON_FT_CACHE and HF_HOME for caches)."
        )
        free = shutil.disk_usage(existing_parent(path)).free / 2**20
        return UserError(what, str(path), fix, free=free)
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
