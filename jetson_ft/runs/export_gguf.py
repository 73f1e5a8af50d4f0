"""The GGUF exports of a run: the merged model in several file types, and the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jetson_ft import adapter
from jetson_ft.export import check, gguf, modelfile
from jetson_ft.export.quantize import quantize_file
from jetson_ft.files import disk_errors, staging_folder
from jetson_ft.models import loading
from jetson_ft.runs.exports import NOT_CHECKED, Job, export_name, merge_model, new_export


def make_models(job: Job, home: Path, file_types: Sequence[str]) -> list[Path]:
    """Make a GGUF export of each file type, from one merged model; return their folders.

    The merged model is fp16: f16 then has the same weights as if it came from fp32, and the others
    are quantised from it. f16 comes last, because the file is the source of the others.
    """
    with staging_folder(home / "gguf") as work, disk_errors(home):
        merged, source = work / "merged", work / "f16.gguf"
        facts, _merge_check = merge_model(job, merged, "fp16")
        gguf.convert_model(
            merged, source, "f16", lambda done, total: job.on_progress("converting", done, total)
        )
        for file_type in sorted(set(file_types), key=lambda name: name == "f16"):
            with new_export(job, home, "gguf", file_type) as (folder, parts):
                path = folder / f"{job.run.label}-{file_type}.gguf"
                if file_type == "f16":
                    source.rename(path)
                else:
                    what = f"quantising {file_type}"
                    quantize_file(
                        source, path, file_type,
                        lambda done, total, what=what: job.on_progress(what, done, total),
                    )  # fmt: skip
                modelfile.write_modelfile(folder, path.name, merged)
                parts["merge"] = facts
                parts["check"] = _check(job, path, merged, file_type)
    return [home / export_name("gguf", name) for name in dict.fromkeys(file_types)]


def make_lora(job: Job, home: Path) -> Path:
    """Make the adapter's GGUF file; return its folder."""
    with staging_folder(home / "lora") as work, disk_errors(home):
        base = work / "base"  # its weights aren't needed
        base.mkdir()
        loading.load_config(job.base).save_pretrained(base)
        adapter.load_tokenizer(job.base, job.adapter_dir).save_pretrained(base)
        with new_export(job, home, "lora") as (folder, parts):
            gguf.convert_adapter(base, job.adapter_dir, folder / f"{job.run.label}-lora.gguf")
            parts["merge"], parts["check"] = None, NOT_CHECKED
    return home / "lora"


def _check(job: Job, path: Path, merged: Path, file_type: str) -> dict[str, Any]:
    if job.heldout is None:
        return NOT_CHECKED
    return check.check_export(path, merged, job.heldout, job.heldout_messages, file_type)
