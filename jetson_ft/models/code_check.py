"""Refuse files of a model or an adapter that choose code, or weights other than safetensors.

transformers and PEFT read names of classes, modules and kernels from such files. No setting allows
code of others. Kernels, also those that transformers itself chooses for a kind of layer or of
quantization, are downloaded from the Hub with the package `kernels`, which is disabled here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors, read_json, refuse_special

# Without the package transformers uses code of its own, or dequantizes. Its USE_HUB_KERNELS=NO does
# not hold for quantized weights (`integrations.mxfp4`).
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # as if not installed

# The files whose values transformers and PEFT act on.
_CONFIGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "adapter_config.json",
)  # fmt: skip
# Of the files that are read from a model's folder.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".gguf")
_INDEX = "*.safetensors.index.json"
_SWITCHES = ("trust_remote_code", "megatron_config")  # PEFT imports `megatron_core` for the second
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# transformers' own; `loading` replaces the choice of a config by transformers' default.
_OWN_IMPLEMENTATIONS = {
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4", "grouped_mm", "batched_mm",
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Check the files of a model or an adapter before anything is loaded from them.

    Raises:
        UserError: one of them chooses code that is not transformers' own, or weights that are not
            safetensors in the same folder; is not a JSON object; or is no stored file.
    """
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.suffix in _SUFFIXES:
                refuse_special(path)
    for name in _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        content = _read_object(path)
        for key, value in _chosen_code(content):
            raise UserError(
                _("The file chooses code that is not a part of transformers: {key} = {value}."),
                str(path),
                _("Such code is never run. If the model works without it, remove the key."),
                key=key,
                value=repr(value)[:100],
            )
        weights = content.get("transformers_weights")
        _check_names(path, [] if weights is None else [weights])
    for path in sorted(folder.glob(_INDEX)):
        names = _read_object(path).get("weight_map")
        _check_names(path, names.values() if isinstance(names, dict) else [names])


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        what, fix = _("Expected a JSON object."), _("Replace it with an intact copy.")
        raise UserError(what, str(path), fix)
    return content


def _chosen_code(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys, at any depth, that choose code, with their values.

    `auto_map` of the whole model is no such key: `files.resolve_model` and `loading` refuse it
    where transformers lacks the class, and it is ignored elsewhere, as in copies of Phi-1.5.
    """
    parts: list[tuple[str, Any]] = [("", content)]
    while parts:
        place, value = parts.pop()
        if isinstance(value, list):
            parts += [(place, item) for item in value]
        if not isinstance(value, dict):
            continue
        for name, item in value.items():
            key = f"{place}.{name}" if place else name
            if name.removeprefix("_").startswith(_IMPLEMENTATIONS):
                yield from _foreign_implementations(key, item)
            elif item and (name in _SWITCHES or (name == "auto_map" and place)):
                yield key, item
            else:
                parts.append((key, item))


def _foreign_implementations(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the value, or those of its parts, that name an implementation of others."""
    for item in value.values() if isinstance(value, dict) else [value]:
        is_name = isinstance(item, str) and item.removeprefix("paged|") in _OWN_IMPLEMENTATIONS
        if not (item is None or isinstance(item, bool) or is_name):
            yield key, item


def _check_names(path: Path, names: Any) -> None:
    """Raise a UserError unless all are names of safetensors files or indexes in a folder."""
    for name in names:
        is_plain = isinstance(name, str) and Path(name).name == name
        if not (is_plain and name.endswith((".safetensors", ".safetensors.index.json"))):
            raise UserError(
                _("The file names weights that are not safetensors in the same folder: {name}."),
                str(path),
                _("Use a safetensors version of the model; pickled weights could run code."),
                name=repr(name)[:100],
            )
