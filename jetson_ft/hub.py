"""The model hub: listing and fetching files, and plain words for its refusals.

Downloads go to huggingface_hub's cache (`HF_HOME`), are resumed where they were cut off,
and honour `HF_ENDPOINT` (a mirror), `HF_TOKEN` (gated models) and `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from jetson_ft.errors import UserError
from jetson_ft.paths import disk_error

Kind = Literal["model", "dataset"]

_WORKS_OFFLINE = (
    "What works offline: `model: embedded` with `data.train: bundled`, any local folder or file, "
    "and what was downloaded before (copy HF_HOME from another machine)."
)


def endpoint() -> str:
    """The hub's address, or the mirror named by `HF_ENDPOINT`."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def list_files(repo: str, kind: Kind) -> list[str]:
    """Paths of the files in a repository; from the local cache when the hub is out of reach."""
    from huggingface_hub import HfApi

    # Asked first, since the client would retry for half a minute before it gives up.
    if not reachable():
        cached = cached_files(repo, kind)
        if cached:
            return cached
        with hub_errors(repo, kind):
            raise ConnectionError("no answer")
    with hub_errors(repo, kind):
        return sorted(HfApi().list_repo_files(repo, repo_type=kind))


def cached_files(repo: str, kind: Kind) -> list[str]:
    """Paths of the files of a repository that were downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, repo_type=kind, local_files_only=True))
    except LocalEntryNotFoundError:
        return []
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fetch(repo: str, kind: Kind, patterns: list[str]) -> Path:
    """Downloads the files that match (shell patterns) and returns the folder they lie in."""
    from huggingface_hub import snapshot_download

    with hub_errors(repo, kind):
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns))


def reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers at all within `timeout` seconds; asks nothing else of it."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    request = urllib.request.Request(endpoint(), method="HEAD")  # noqa: S310 - the hub's
    try:
        urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
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
            f"The {noun} {repo!r} is gated.",
            where,
            "Accept its terms on that page, then set HF_TOKEN to an access token of yours.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"The hub knows no {noun} {repo!r}, or it is private.",
            where,
            "Check the spelling; for a private or gated one set HF_TOKEN. "
            "A local folder or file is named by its path.",
        ) from error
    except OSError as error:
        # The client's network errors are OSErrors too; a full or read-only disk is not theirs.
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise disk_error(
                Path(error.filename or os.environ.get("HF_HOME", "~")), error
            ) from error
        raise _out_of_reach(repo, noun, where) from error
    except errors.HfHubHTTPError as error:
        raise _out_of_reach(repo, noun, where) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise _out_of_reach(repo, noun, where) from error
        raise


def _out_of_reach(repo: str, noun: str, where: str) -> UserError:
    return UserError(
        f"The hub is out of reach, so the {noun} {repo!r} can't be fetched.",
        where,
        "Check the network; a mirror is set with HF_ENDPOINT=https://… and a token for gated "
        "repositories with HF_TOKEN. A cut-off download goes on where it stopped. "
        + _WORKS_OFFLINE,
    )
