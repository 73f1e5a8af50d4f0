"""Resolve the name in a recipe to files on disk: `embedded`, a folder, or a hub id.

Weights are safetensors or GGUF. Pickled weights and models that need code of their own are
refused here, before any of their files is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft import hub
from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors, expand_user, read_json, refuse_special
from jetson_ft.models import embedded
from jetson_ft.models.code_check import check_folder

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ["tokenizer.json", "*.model", "vocab.json", "vocab.txt"]  # one is enough
_SMALL_FILES = ["*.json", "*.jinja", "merges.txt", *_TOKENIZER_FILES]
_SAMPLE = 1 << 16
_PLACES, _PAGE = 1024, 4096


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model on disk."""

    name: str  # as in the recipe
    folder: Path
    gguf_file: str | None = None

    def weight_files(self) -> list[Path]:
        """Return the files of the weights, sorted."""
        if self.gguf_file:
            return [self.folder / self.gguf_file]
        return sorted(self.folder.glob("*.safetensors"))

    def fingerprint(self) -> str:
        """Return a hash that distinguishes bases, in milliseconds for any size.

        SHA-256 over each weight file's size, head (for safetensors: names, shapes and
        offsets of all tensors) and samples from its middle and end.
        """
        digest = hashlib.sha256()
        for path in self.weight_files():
            size = path.stat().st_size
            digest.update(f"{path.suffix} {size}\n".encode())
            _hash_samples(digest, path, (0, size // 2, max(0, size - _SAMPLE)), _SAMPLE)
        return digest.hexdigest()

    def weight_hashes(self) -> dict[str, str]:
        """Return a hash of each weight file by its name, in about a thousand reads of a page.

        SHA-256 over its size and `_PLACES` samples of a page, spread evenly. A change is noticed
        where a sample lies in it: of a whole tensor that is larger than the distance of two samples
        (a thousandth of the file), of a smaller one by chance, of a single number seldom.
        """
        hashes = {}
        for path in self.weight_files():
            size = path.stat().st_size
            digest = hashlib.sha256(f"{size}\n".encode())
            _hash_samples(digest, path, range(0, size, max(_PAGE, size // _PLACES)), _PAGE)
            hashes[path.name] = digest.hexdigest()
        return hashes


def _hash_samples(digest: Any, path: Path, starts: Iterable[int], size: int) -> None:
    """Add the bytes from each start on to the hash."""
    with disk_errors(path), open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(size))


def resolve_model(name: str, weights: bool = True) -> BaseModelFiles:
    """Return the model's files; download those of a hub id, without `weights` only the others.

    Raises:
        UserError: unknown, not reachable, without usable weights, or in need of code of its own.
    """
    if name == "embedded":
        return BaseModelFiles(name, embedded.embedded_folder())
    folder = expand_user(name)
    refuse_special(folder)
    if folder.is_dir():
        base = BaseModelFiles(name, folder.resolve(), _single_gguf(folder))
    elif folder.is_file() and folder.suffix == ".gguf":
        base = BaseModelFiles(name, folder.parent.resolve(), folder.name)
    elif is_hub_id(name):
        base = BaseModelFiles(name, _download(name, weights))
    else:
        raise UserError(
            _("Model not found."),
            name,
            _("Give `embedded`, a hub id such as `microsoft/phi-1_5`, or a folder that exists."),
        )
    check_folder(base.folder)
    path = base.folder / "config.json"
    config = read_json(path) if path.is_file() else {}  # a GGUF file contains its own
    # "auto_map" points to code: transformers must have the architecture itself.
    if "auto_map" in config and not has_architecture(config.get("model_type")):
        raise UserError(
            _("The architecture {name} needs code from its repository, which is never run."),
            str(base.folder),
            _("Choose a model whose architecture transformers has itself."),
            name=json.dumps(config.get("model_type")),
        )
    if weights:
        _require_weights(base)
    return base


def has_architecture(model_type: str | None) -> bool:
    """Return whether transformers has the architecture that a config names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer's vocabulary."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def is_hub_id(name: str) -> bool:
    """Return whether a name means a repository on the Hub; a local path takes precedence."""
    return hub.REPO_ID.fullmatch(name) is not None and not expand_user(name).exists()


def has_weights_here(name: str) -> bool:
    """Return whether a model's weights are on this machine: bundled, a local path, or downloaded.

    Raises:
        UserError: the name is impossible, or the Hub's cache can't be read.
    """
    if not is_hub_id(name):
        return True
    folder = hub.cached_folder(name, "model")
    return folder is not None and any(folder.glob("*.safetensors"))


def is_base_model(name: str) -> bool:
    """Return whether a name means a model: `base`, `embedded`, a hub id, a model's folder."""
    if name in ("base", "embedded"):
        return True
    try:
        path = expand_user(name)
        if not path.exists():  # `runs/NAME` is a path, even if that run doesn't exist
            return hub.REPO_ID.fullmatch(name) is not None and not path.parent.exists()
        files = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    except (OSError, UserError):  # not readable; a `~user` that doesn't exist
        return False
    is_model = "config.json" in files or any(file.endswith(".gguf") for file in files)
    return is_model and "adapter_config.json" not in files


def _download(repo: str, weights: bool) -> Path:
    files = hub.list_files(repo, "model")
    safetensors = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    # Some repositories have the weights twice, under the names of another library too.
    safetensors = [file for file in safetensors if file.startswith("model")] or safetensors
    if weights and not safetensors:
        raise _unusable_weights(repo, files)
    return hub.fetch(repo, "model", [*(safetensors if weights else []), *_SMALL_FILES])


def _single_gguf(folder: Path) -> str | None:
    """Return the GGUF file of a folder that has no safetensors, or None."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if not names or any(folder.glob("*.safetensors")):
        return None
    if len(names) > 1:
        what, fix = _("Several GGUF files found."), _("Name one: {names}.")
        raise UserError(what, str(folder), fix, names=", ".join(names))
    return names[0]


def _require_weights(base: BaseModelFiles) -> None:
    files = [path.name for path in base.folder.iterdir()]
    if "adapter_config.json" in files:
        # transformers would take whatever base that file names.
        raise UserError(
            _("Expected a base model, found an adapter."),
            str(base.folder),
            _("Name the model it was trained for; `jetson-ft chat FOLDER` chats with an adapter."),
        )
    if base.gguf_file:
        return
    if not any(name.endswith(".safetensors") for name in files):
        raise _unusable_weights(str(base.folder), files)
    if "config.json" not in files:
        what = _("The model's config.json is missing.")
        raise UserError(what, str(base.folder), _("Copy it into the folder."))


def _unusable_weights(where: str, files: list[str]) -> UserError:
    what = _("No weights found that can be loaded.")
    fix = _("Safetensors are needed, or one GGUF file, named by its path once it is downloaded.")
    if any(name.endswith(_PICKLED) for name in files):
        what = _("This model has pickled weights only; loading them could run foreign code.")
        fix = _("Use a safetensors version of it (the hub's converter makes one), or a GGUF file.")
    return UserError(what, where, fix)
