"""From the name in a recipe to files on disk: `embedded`, a folder, or a hub id.

Weights are safetensors or GGUF; pickled ones and models that need code of their own are
refused here, before anything of them is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft import hub
from jetson_ft.errors import UserError
from jetson_ft.models import embedded
from jetson_ft.paths import read_json
from jetson_ft.recipe import HUB_ID

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Base:
    """A base model on disk."""

    name: str  # as the recipe says
    folder: Path
    gguf_file: str | None = None

    def config(self) -> dict[str, Any]:
        """The folder's config.json; empty for a GGUF file, which carries its own."""
        path = self.folder / "config.json"
        return dict(read_json(path)) if path.is_file() else {}

    def fingerprint(self) -> str:
        """Tells two bases apart in milliseconds, whatever their size.

        SHA-256 over each weight file's size, head (for safetensors: names, shapes and
        places of all tensors) and samples from its middle and end.
        """
        digest = hashlib.sha256()
        for path in self._weight_files():
            size = path.stat().st_size
            digest.update(f"{path.suffix} {size}\n".encode())
            with open(path, "rb") as file:
                for start in (0, size // 2, max(0, size - _SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()

    def _weight_files(self) -> list[Path]:
        if self.gguf_file:
            return [self.folder / self.gguf_file]
        return sorted(self.folder.glob("*.safetensors"))


def resolve(name: str, weights: bool = True) -> Base:
    """Finds the model and, for a hub id, downloads it; without `weights` all but those.

    Raises:
        UserError: unknown, out of reach, without usable weights, or in need of remote code.
    """
    if name == "embedded":
        return Base(name, embedded.folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        base = Base(name, folder.resolve(), _single_gguf(folder))
    elif folder.is_file() and folder.suffix == ".gguf":
        base = Base(name, folder.resolve().parent, folder.name)
    elif HUB_ID.fullmatch(name) and not folder.exists():
        base = Base(name, _download(name, weights))
    else:
        raise UserError(
            "There is no such model.",
            name,
            "Give `embedded`, a hub id such as `microsoft/phi-1_5`, or a folder that exists.",
        )
    _refuse_foreign_code(base)
    if weights:
        _require_weights(base, [path.name for path in base.folder.iterdir()])
    return base


def is_base(name: str) -> bool:
    """Whether a name means a model by itself: `base`, `embedded`, a hub id, a model's folder."""
    if name in ("base", "embedded"):
        return True
    try:
        path = Path(name).expanduser()
        if not path.exists():  # `runs/NAME` is a path, even where there is no such run
            return HUB_ID.fullmatch(name) is not None and not path.parent.exists()
        files = [one.name for one in path.iterdir()] if path.is_dir() else [path.name]
    except (OSError, RuntimeError):  # not to be read; nobody's home
        return False
    is_model = "config.json" in files or any(file.endswith(".gguf") for file in files)
    return is_model and "adapter_config.json" not in files


def _download(repo: str, weights: bool) -> Path:
    files = hub.list_files(repo, "model")
    found = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    # Some repositories hold the weights twice, under the names of another library too.
    found = [file for file in found if file.startswith("model")] or found
    if weights and not found:
        _refuse_weights(repo, files)
    return hub.fetch(repo, "model", [*(found if weights else []), *_SMALL_FILES])


def _single_gguf(folder: Path) -> str | None:
    """The GGUF file of a folder that holds no safetensors."""
    if any(folder.glob("*.safetensors")):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError("Several GGUF files lie there.", str(folder), f"Name one: {names}.")
    return found[0].name if found else None


def _require_weights(base: Base, files: list[str]) -> None:
    if "adapter_config.json" in files:
        # transformers would take whatever base that file names.
        raise UserError(
            "An adapter lies there, not a base model.",
            str(base.folder),
            "Name the model it was made for; `jetson-ft chat FOLDER` talks with an adapter.",
        )
    if not base.gguf_file and not any(name.endswith(".safetensors") for name in files):
        _refuse_weights(str(base.folder), files)
    if not base.gguf_file and not (base.folder / "config.json").is_file():
        raise UserError("The model's config.json is missing.", str(base.folder), "Copy it there.")


def _refuse_weights(where: str, files: list[str]) -> None:
    if any(name.endswith(_PICKLED) for name in files):
        raise UserError(
            "This model has pickled weights only; loading them could run foreign code.",
            where,
            "Use a safetensors version of it (the hub's converter makes one), or a GGUF file.",
        )
    raise UserError(
        "No weights lie there that can be loaded.",
        where,
        "Safetensors are needed, or one GGUF file, named by its path once it is downloaded.",
    )


def _refuse_foreign_code(base: Base) -> None:
    """Configs that point to code are fine where transformers has the architecture itself."""
    config = base.config()
    if "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"The architecture {json.dumps(config.get('model_type'))} needs code from its "
            "repository, which is never run.",
            str(base.folder),
            "Choose a model whose architecture transformers has itself.",
        )
