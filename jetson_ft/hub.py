"""The model hub: list, download and upload files, and report its errors in plain words.

Downloads go to huggingface_hub's cache (`HF_HOME`) and use `HF_ENDPOINT` (a mirror), `HF_TOKEN`
(gated models, uploads) and `HF_HUB_OFFLINE`. The client resumes a cut-off download only within one
call. Weights are large and networks unreliable, so large files are downloaded here, into a `.part`
file beside the cache's own, and each call resumes where the last one ended.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_error, require_space, sha256_file

logger = logging.getLogger(__name__)
# The client reads it when it is imported, which only functions here and above do.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

Kind = Literal["model", "dataset"]
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_NETWORK_FIX = _(
    "Check the network; a mirror is set with HF_ENDPOINT=https://… and a token for gated "
    "repositories with HF_TOKEN. A cut-off download resumes where it stopped. These work offline: "
    "`model: embedded` with `data.train: bundled`, any local folder or file, and earlier downloads "
    "(copy HF_HOME from another machine)."
)
# The client of large files raises a ConnectionError for any answer.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2")  # modules of the client's errors

DownloadCallback = Callable[[str, int, int, float | None], None]
_REPORT_SECONDS = 2.0
_callback: ContextVar[DownloadCallback | None] = ContextVar("download_callback", default=None)


@contextmanager
def download_progress(callback: DownloadCallback) -> Iterator[None]:
    """Call `callback` every two seconds while a large file is downloaded in this context.

    Its arguments are the file's name, the bytes downloaded, the bytes in all, and the seconds left
    (None: not known yet). An exception that it raises ends the download; a later one resumes.
    """
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def endpoint() -> str:
    """Return the Hub's address, or the mirror's that `HF_ENDPOINT` sets."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def cache_folder() -> Path:
    """Return the folder of the client's cache: `HF_HUB_CACHE`, or else `HF_HOME` decides."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def list_files(repo: str, kind: Kind) -> list[str]:
    """Return the paths of a repository's files; of the cached ones if the Hub can't be reached."""
    from huggingface_hub import HfApi

    with hub_errors(repo, kind):
        # Checked first, since the client retries for half a minute before it gives up.
        if reachable():
            return sorted(HfApi().list_repo_files(repo, repo_type=kind))
        folder = cached_folder(repo, kind)
        files = [path for path in folder.rglob("*") if path.is_file()] if folder else []
        if not folder or not files:
            raise ConnectionError("no answer")
        return sorted(str(path.relative_to(folder)) for path in files)


def cached_folder(repo: str, kind: Kind) -> Path | None:
    """Return the folder of the files that are in the local cache, or None; use no network.

    Raises:
        UserError: the name is impossible, or the cache can't be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    with hub_errors(repo, kind):
        try:
            return Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
        except IncompleteSnapshotError as error:  # usual: only needed files are downloaded
            return Path(error.snapshot_path)
        except LocalEntryNotFoundError:
            return None


def downloaded_models() -> list[str]:
    """Return the ids of the models whose weights are in the local cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):  # with a damaged cache the list is just empty
        return []
    names = set()
    for repo in repos:
        files = (file for revision in repo.revisions for file in revision.files)
        if repo.repo_type == "model" and any(f.file_name.endswith(".safetensors") for f in files):
            names.add(repo.repo_id)
    return sorted(names)


def fetch(repo: str, kind: Kind, patterns: list[str]) -> Path:
    """Download the files that match the shell patterns and return the folder they are in.

    If the Hub can't be reached, the local cache must have them all.

    Raises:
        UserError: as `hub_errors`, or a downloaded file is damaged.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo, kind):
        online = reachable()
        if online:
            _fetch_large_files(repo, kind, patterns)
        options: dict[str, Any] = {"allow_patterns": patterns, "local_files_only": not online}
        return Path(snapshot_download(repo, repo_type=kind, **options))


class _PartFile(io.BufferedWriter):
    """The downloaded part of a file; reports its growth to the callback."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._name, self._size, self._start = name, size, self.tell()
        self._started = self._reported = time.monotonic()

    def write(self, data: Any) -> int:
        """Append the data; report at intervals."""
        written = super().write(data)
        now, callback = time.monotonic(), _callback.get()
        if callback and now - self._reported >= _REPORT_SECONDS:
            self._reported, done = now, self.tell()
            rate = (done - self._start) / (now - self._started)
            callback(self._name, done, self._size, (self._size - done) / rate if rate else None)
        return written


def _fetch_large_files(repo: str, kind: Kind, patterns: list[str]) -> None:
    """Download LFS files into the cache, where the client then finds them.

    A file gets its name there, its SHA-256, once it is whole.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils._headers import build_hf_headers

    info: Any = HfApi().repo_info(repo, repo_type=kind, files_metadata=True)
    cache = cache_folder() / repo_folder_name(repo_id=repo, repo_type=kind)
    missing = {}  # files by blob
    for file in info.siblings:
        matches = any(fnmatch(file.rfilename, pattern) for pattern in patterns)
        blob = cache / "blobs" / file.lfs.sha256 if matches and file.lfs else None
        if blob and not blob.exists() and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            missing[blob] = file
    parts = (blob.with_suffix(".part") for blob in missing)
    here = sum(part.stat().st_size for part in parts if part.exists())
    needed = sum(file.size for file in missing.values()) - here
    require_space(cache, needed, Message(_("the download of {repo}"), {"repo": repo}))
    for blob, file in missing.items():
        url = hf_hub_url(repo, file.rfilename, repo_type=kind, revision=info.sha)
        part = blob.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with _PartFile(part, file.rfilename, file.size) as output:
            fcntl.flock(output, fcntl.LOCK_EX)
            if blob.exists():  # another process has downloaded it
                continue
            sizes = {"resume_size": output.tell(), "expected_size": file.size}
            http_get(url, output, headers=build_hf_headers(), **sizes)
            output.flush()
            if sha256_file(part) != blob.name:
                part.unlink()
                what = _("A download was damaged and has been deleted.")
                raise UserError(what, url, _("Download it again."))
            part.replace(blob)


@dataclass(frozen=True)
class UploadTarget:
    """A repository of models on the Hub, and the account that would write to it."""

    repo: str
    user: str  # whose access token is used
    is_private: bool | None  # None: the repository doesn't exist yet


def upload_target(repo: str) -> UploadTarget:
    """Return what there is under a name on the Hub; send nothing but the access token.

    Raises:
        UserError: the name is impossible, there is no token that may write, or no network.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not REPO_ID.fullmatch(repo):
        fix = _("Write OWNER/NAME: your name on the Hub, or your organization's, and a new name.")
        raise UserError(_("{repo!r} is no name of a repository."), endpoint(), fix, repo=repo)
    token_page = f"{endpoint()}/settings/tokens"
    with _upload_errors(repo):
        if is_offline() or not reachable():
            raise ConnectionError("no answer")
        if not get_token():
            fix = _("Run `hf auth login`, or set HF_TOKEN to an access token that may write.")
            raise UserError(_("No access token for the Hub is set."), token_page, fix)
        user = HfApi().whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            fix = _("Make a token that may write, and set HF_TOKEN to it or `hf auth login` again.")
            what = _("The access token of {user} may only read.")
            raise UserError(what, token_page, fix, user=user["name"])
        try:
            is_private = HfApi().model_info(repo).private is True
        except RepositoryNotFoundError:
            return UploadTarget(repo, user["name"], None)
    return UploadTarget(repo, user["name"], is_private)


def upload(
    target: UploadTarget, files: dict[str, Path | bytes], private: bool, message: str
) -> None:
    """Send files in one commit; make the repository if there is none.

    What an earlier, interrupted call has sent is not sent again. Nobody sees a part of the files.

    Args:
        files: by their names in the repository; others that are there stay.
        private: of a repository that is made.

    Raises:
        UserError: the Hub refuses it, or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _upload_errors(target.repo):
        if target.is_private is None:
            HfApi().create_repo(target.repo, private=private)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        HfApi().create_commit(target.repo, operations, commit_message=message)


@contextmanager
def _upload_errors(repo: str) -> Iterator[None]:
    """Raise any error of the Hub's client while it sends to `repo` as one plain `UserError`."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The client wraps what went wrong with one of several files.
        cause = error.__cause__ if type(error) is RuntimeError else error
        where, fix = f"{endpoint()}/{repo}", Message(_("Try again later."))
        status = 0
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
        elif match := _XET_STATUS.search(str(cause)):
            status = int(match[1])
        if isinstance(cause, errors.HFValidationError):
            what = _("{repo!r} is no name of a repository.")
            fix = Message(_("Use letters, digits, dots, dashes and underscores."))
        elif status:
            what = _("Nothing was published: the Hub answered with error {status}.")
            if status in (401, 403, 404):
                what = _("Nothing was published: the access token may not write to {repo!r}.")
                fix = Message(
                    _("Check the owner's name, and that the token (HF_TOKEN, or `hf auth login`) "
                      "may write there.")
                )  # fmt: skip
            elif status == 409:
                what = _("Nothing was published: {repo!r} has changed meanwhile.")
                fix = Message(_("Run the command again."))
        elif isinstance(cause, Exception) and _is_network_error(cause):
            what = _("Nothing was published: the Hub can't be reached.")
            fix = Message(
                _("Check the network, then run the command again: what was sent already is not "
                  "sent twice.")
            )  # fmt: skip
            if is_offline():
                what = _("Nothing was published: HF_HUB_OFFLINE is set.")
                fix = Message(_("Unset it to publish."))
        elif isinstance(cause, OSError):
            raise disk_error(Path(str(cause.filename)), cause) from error
        elif isinstance(cause, ValueError):
            what = _("Nothing was published: the Hub refuses the files ({error}).")
            fix = Message(_("Change what it names, then run the command again."))
        else:
            raise
        raise UserError(
            Message(what, {"repo": repo, "status": status, "error": str(cause)}), where, fix
        ) from error


def reachable(timeout: float = 3.0) -> bool:
    """Return whether the Hub answers at all within `timeout` seconds."""
    import urllib.error
    import urllib.request

    if is_offline():
        return False
    answered = Event()

    def connect() -> None:
        try:
            request = urllib.request.Request(endpoint(), method="HEAD")  # noqa: S310 - the Hub's
            urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310
        except urllib.error.HTTPError:
            pass
        except Exception as error:  # a missing network raises too many types to list
            logger.debug("%s: %r", endpoint(), error)
            return
        answered.set()

    # In a thread, because looking up a name and trying its addresses one by one can take minutes.
    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def is_offline() -> bool:
    """Return whether `HF_HUB_OFFLINE` forbids network access; its values are the client's."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def hub_errors(repo: str, kind: Kind) -> Iterator[None]:
    """Raise any error of the Hub's client about `repo` as one plain `UserError`."""
    from huggingface_hub import errors

    status = 0
    try:
        yield
    except Exception as error:
        if isinstance(error, errors.GatedRepoError):
            what = _("'{repo}' is gated on the Hub.")
            fix = _("Accept its terms on that page, then set HF_TOKEN to an access token of yours.")
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            what = _("Model '{repo}' not found on the Hub, or it is private.")
            if kind == "dataset":
                what = _("Data set '{repo}' not found on the Hub, or it is private.")
            fix = _(
                "Check the spelling; for a private or gated repository set HF_TOKEN. For a local "
                "folder or file, write its path."
            )
        elif isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            what = _("'{repo}' can't be downloaded: the Hub answered with error {status}.")
            fix = _("Try again later, or set a mirror with HF_ENDPOINT=https://…")
            if status in (401, 403):
                fix = _("Check HF_TOKEN, or unset it: the Hub refuses it.")
        elif _is_network_error(error):
            what, fix = _("'{repo}' can't be downloaded: the Hub can't be reached."), _NETWORK_FIX
            if is_offline():
                what = _("'{repo}' can't be downloaded: HF_HUB_OFFLINE is set.")
        elif isinstance(error, OSError):
            raise disk_error(Path(error.filename or cache_folder()), error) from error
        else:
            raise
        where = f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        raise UserError(what, where, fix, repo=repo, status=status) from error


def _is_network_error(error: Exception) -> bool:
    """Return whether an error is of the network; the client's are OSErrors without an errno."""
    if isinstance(error, OSError):
        return error.errno is None or isinstance(error, ConnectionError | TimeoutError)
    return type(error).__module__.partition(".")[0] in _HTTP_CLIENTS
