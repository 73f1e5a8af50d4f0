"""The exports of a run: `runs/<id>/export/<name>/`, each complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jetson_ft.runs.store import Run

# (part of the work in English, done, total); a part begins at 0 done, its total may be 0: unknown.
ExportProgress = Callable[[str, int, int], None]

# Kind of an export -> what it is for (docs/export.md).
KINDS = {
    "merged": "safetensors of the whole model, for transformers, vLLM and others",
    "gguf": "GGUF of the whole model, for llama.cpp and Ollama",
    "lora": "GGUF of the adapter alone, for llama.cpp beside a GGUF of the base",
}


def make_export(
    run: Run,
    kind: str,
    *,
    quantize: Sequence[str] = ("f16",),
    dtype: str = "bf16",
    check: bool = True,
    on_progress: ExportProgress = lambda part, done, total: None,
) -> list[Path]:
    """Make a run's exports of one kind; return their folders, for gguf one for each `quantize`.

    A folder of the same name is replaced once the new one is complete.

    Args:
        kind: a key of `KINDS`.
        quantize: file types, for gguf.
        dtype: bf16 or fp16, for merged.
        check: measure what was written against the adapter; refuse it if it differs too much.

    Raises:
        UserError: no adapter yet, another base, too little disk or memory, what can't be
            expressed, a failed check, or another export of this run at work.
    """
    raise NotImplementedError


def export_name(kind: str, file_type: str = "") -> str:
    """Return the name of an export's folder: `merged`, `gguf-q8_0`, `lora`."""
    return f"{kind}-{file_type}" if kind == "gguf" else kind


def find_export(run: Run, name: str) -> dict[str, Any] | None:
    """Return `export.json` of a complete export, with `check` and `path`; None: there is none."""
    raise NotImplementedError


def list_exports(run: Run) -> list[dict[str, Any]]:
    """Return `find_export` of each export of the run, by name."""
    raise NotImplementedError
