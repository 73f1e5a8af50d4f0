"""The model hub: listing and fetching files, and plain words for its refusals.

Downloads go to huggingface_hub's cache (`HF_HOME`) and honour `HF_ENDPOINT` (a mirror),
`HF_TOKEN` (gated models) and `HF_HUB_OFFLINE`. The client takes up a cut-off download only
within one call; weights are big and nets on the workbench bad, so large files are fetched here,
into a `.part` file beside the cache's own, and go on where the last attempt ended.
"""

from __future__ import annotations

import fcntl
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

from jetson_ft.errors import UserError
from jetson_ft.paths import disk_error, sha256_file

Kind = Literal["model", "dataset"]

_WORKS_OFFLINE = (
    "What works offline: `model: embedded` with `data.train: bundled`, any local folder or file, "
    "and what was downloaded before (copy HF_HOME from another machine)."
)
_ON = ("1", "ON", "YES", "TRUE")  # as the client reads HF_HUB_OFFLINE

Tell = Callable[[str, int, int, float | None], None]
_TOLD_EVERY = 2.0  # seconds
_tell: ContextVar[Tell | None] = ContextVar("tell", default=None)


@contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Within it, `tell` hears how far a large file has come.

    It is given the file's name, bytes here, bytes in all, and seconds left (None: not known
    yet). What it raises ends the download; the part that is here stays.
    """
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


def endpoint() -> str:
    """The hub's address, or the mirror named by `HF_ENDPOINT`."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def list_files(repo: str, kind: Kind) -> list[str]:
    """Paths of the files in a repository; from the local cache when the hub is out of reach."""
    from huggingface_hub import HfApi

    with hub_errors(repo, kind):
        # Asked first, since the client would retry for half a minute before it gives up.
        if reachable():
            return sorted(HfApi().list_repo_files(repo, repo_type=kind))
        if cached := cached_files(repo, kind):
            return cached
        raise ConnectionError("no answer")


def cached_files(repo: str, kind: Kind) -> list[str]:
    """Paths of the files of a repository that were downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
    except IncompleteSnapshotError as error:  # usual: only the files that we need are fetched
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return []
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def downloaded_models() -> list[str]:
    """Models whose weights lie in the hub's cache, by their ids."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        found = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):  # a damaged cache hides no more than this list
        return []
    models = (repo for repo in found if repo.repo_type == "model")
    return sorted(repo.repo_id for repo in models if _has_weights(repo))


def _has_weights(repo: Any) -> bool:
    files = (file for revision in repo.revisions for file in revision.files)
    return any(file.file_name.endswith(".safetensors") for file in files)


def fetch(repo: str, kind: Kind, patterns: list[str]) -> Path:
    """Downloads the files that match (shell patterns) and returns the folder they lie in.

    With the hub out of reach, the files that were downloaded before, if they are all there.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo, kind):
        online = reachable()
        if online:
            _fetch_large_files(repo, kind, patterns)
        return Path(
            snapshot_download(
                repo, repo_type=kind, allow_patterns=patterns, local_files_only=not online
            )
        )


def _fetch_large_files(repo: str, kind: Kind, patterns: list[str]) -> None:
    """Puts what the hub keeps as LFS files into the cache, where the client will find them."""
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    about: Any = HfApi().repo_info(repo, repo_type=kind, files_metadata=True)
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    for file in about.siblings:
        matches = any(fnmatch(file.rfilename, pattern) for pattern in patterns)
        blob = cache / "blobs" / file.lfs.sha256 if matches and file.lfs else None
        if blob and not blob.exists() and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            url = hf_hub_url(repo, file.rfilename, repo_type=kind, revision=about.sha)
            blob.parent.mkdir(parents=True, exist_ok=True)
            _resume(url, blob, file.rfilename, file.size)


class _Growing(io.BufferedWriter):
    """The part of a file that is here, telling how it grows."""

    def __init__(self, path: Path, name: str, size: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._of, self._size, self._began_with = name, size, self.tell()
        self._began = self._told = time.monotonic()

    def write(self, data: Any) -> int:
        written = super().write(data)
        now, tell = time.monotonic(), _tell.get()
        if tell and now - self._told >= _TOLD_EVERY:
            self._told, here = now, self.tell()
            rate = (here - self._began_with) / (now - self._began)
            tell(self._of, here, self._size, (self._size - here) / rate if rate else None)
        return written


def _resume(url: str, blob: Path, name: str, size: int) -> None:
    """Fetches the rest of a file; it gets its name (its SHA-256) once it is whole."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    part = blob.with_suffix(".part")
    with _Growing(part, name, size) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if blob.exists():  # another process was faster
            return
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size)
        file.flush()
        if sha256_file(part) != blob.name:
            part.unlink()
            what = "A download arrived damaged and was thrown away."
            raise UserError(what, url, "Start it again.")
        part.replace(blob)


def reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers at all within `timeout` seconds; asks nothing else of it."""
    if told_offline():
        return False
    answers: SimpleQueue[bool] = SimpleQueue()
    # In a thread, because looking up a name and trying its addresses one by one can take minutes.
    Thread(target=lambda: answers.put(_answers(timeout)), daemon=True).start()
    try:
        return answers.get(timeout=timeout)
    except Empty:
        return False


def told_offline() -> bool:
    """Whether the environment forbids asking."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _ON


def _answers(timeout: float) -> bool:
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(endpoint(), method="HEAD")  # noqa: S310 - the hub's
        urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True
    except Exception:  # no network has too many faces to list them
        return False
    return True


@contextmanager
def hub_errors(repo: str, kind: Kind) -> Iterator[None]:
    """Turns whatever the hub's client raises about `repo` into one plain `UserError`."""
    from huggingface_hub import errors

    noun = "data set" if kind == "dataset" else "model"
    where = f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"The {noun} '{repo}' is gated.",
            where,
            "Accept its terms on that page, then set HF_TOKEN to an access token of yours.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"The hub knows no {noun} '{repo}', or it is private.",
            where,
            "Check the spelling; for a private or gated one set HF_TOKEN. "
            "A local folder or file is named by its path.",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(error.response.status_code, noun, repo, where) from error
    except OSError as error:
        # The client's network errors are OSErrors too; a full or read-only disk is not theirs.
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise disk_error(_disk_place(error), error) from error
        raise _out_of_reach(noun, repo, where) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise _out_of_reach(noun, repo, where) from error
        raise


def _disk_place(error: OSError) -> Path:
    from huggingface_hub import constants

    return Path(error.filename or constants.HF_HOME)


def _refused(status: int, noun: str, repo: str, where: str) -> UserError:
    return UserError(
        f"The hub answered with error {status}, so the {noun} '{repo}' can't be fetched.",
        where,
        "Check HF_TOKEN, or unset it: the hub doesn't take it."
        if status in (401, 403)
        else "Try again later, or set a mirror with HF_ENDPOINT=https://…",
    )


def _out_of_reach(noun: str, repo: str, where: str) -> UserError:
    reason = "HF_HUB_OFFLINE is set" if told_offline() else "The hub is out of reach"
    return UserError(
        f"{reason}, so the {noun} '{repo}' can't be fetched.",
        where,
        "Check the network; a mirror is set with HF_ENDPOINT=https://… and a token for gated "
        "repositories with HF_TOKEN. A cut-off download goes on where it stopped. "
        + _WORKS_OFFLINE,
    )
