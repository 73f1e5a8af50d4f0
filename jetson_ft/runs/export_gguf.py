"""The GGUF exports of a run: the merged model in several file types, and the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jetson_ft import adapter
from jetson_ft.data.prepare import PreparedRows
from jetson_ft.errors import UserError, _
from jetson_ft.export import check, gguf, merge, modelfile
from jetson_ft.export.check import Reference
from jetson_ft.export.quantize import quantize_file
from jetson_ft.files import disk_errors, staging_folder
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat
from jetson_ft.runs.exports import (
    NOT_CHECKED,
    Job,
    bits_per_weight,
    export_name,
    merge_model,
    new_export,
)


def make_models(job: Job, home: Path, file_types: Sequence[str]) -> list[Path]:
    """Make a GGUF export of each file type, from one merged model; return their folders.

    The merged model is fp16 (docs/decisions/0021). The type of most bits comes first: where one
    fails its check, those before it are kept.
    """
    with staging_folder(home / "gguf") as work, disk_errors(home):
        merged, source = work / "merged", work / "f16.gguf"
        facts, _check = merge_model(job, merged, "fp16")
        step = partial(job.on_progress, _("converting"))
        gguf.convert_model(merged, source, "f16", step, job.run.label)
        reference = None
        if job.rows:
            model = _load_exact(job, BaseModelFiles(job.run.name, merged))
            reference = _measure(job, job.rows, model)
            del model
        for file_type in sorted(set(file_types), key=bits_per_weight, reverse=True):
            with new_export(job, home, "gguf", file_type) as (folder, parts):
                path = folder / f"{job.run.label}-{file_type}.gguf"
                if file_type == "f16":
                    source.rename(path)
                else:
                    step = partial(job.on_progress, _("quantising {type}").format(type=file_type))
                    quantize_file(source, path, file_type, step)
                modelfile.write_modelfile(folder, path.name, merged)
                parts["merge"] = facts
                parts["check"] = _check_file(job, reference, path, file_type)
            if file_type == "f16":
                source = home / export_name("gguf", file_type) / path.name
    return [home / export_name("gguf", name) for name in dict.fromkeys(file_types)]


def make_lora(job: Job, home: Path) -> Path:
    """Make the adapter's GGUF file; return its folder.

    It is checked on the base model as f16.
    """
    with staging_folder(home / "lora") as work, disk_errors(home):
        base, base_file, reference = work / "base", work / "base.gguf", None
        if job.rows:
            step = partial(job.on_progress, _("converting the base"))
            merge.merge_adapter(job.base, job.adapter_dir, base, "fp16", step, apply=False)
            gguf.convert_model(base, base_file, "f16", step)
            model = adapter.load_adapter(_load_exact(job, job.base), job.base, job.adapter_dir)
            reference = _measure(job, job.rows, model)
            del model
        else:
            base.mkdir()
            loading.load_config(job.base).save_pretrained(base)
            adapter.load_tokenizer(job.base, job.adapter_dir).save_pretrained(base)
        with new_export(job, home, "lora") as (folder, parts):
            path = folder / f"{job.run.label}-lora.gguf"
            gguf.convert_adapter(base, job.adapter_dir, path)
            parts["merge"] = None
            parts["check"] = _check_file(job, reference, base_file, "lora", path)
    return home / "lora"


def _load_exact(job: Job, model: BaseModelFiles) -> Any:
    return loading.load_model(model, WeightFormat(job.plan.precision), job.plan.device)


def _measure(job: Job, rows: PreparedRows, model: Any) -> Reference:
    step = partial(job.on_progress, _("measuring with transformers"))
    return check.measure_reference(model, rows.tokenizer, rows.heldout_messages, rows.heldout, step)


def _check_file(
    job: Job, reference: Reference | None, model: Path, file_type: str, lora: Path | None = None
) -> dict[str, Any]:
    """Return `check.json`.

    Raises:
        UserError: the file differs from the adapter by more than its file type explains.
    """
    if reference is None:
        return NOT_CHECKED
    step = partial(job.on_progress, _("checking {type} with llama.cpp").format(type=file_type))
    result = check.check_file(reference, model, file_type, lora, on_progress=step)
    if not result["passed"]:
        bits = result["bits_per_character"]
        raise UserError(
            _("llama.cpp reads {file} differently: {same} of {prompts} prompts have the same "
              "tokens, {texts} the same reply ({ties} near ties), {export:.4f} bits per character "
              "in place of {adapter:.4f} ({bound:.1%} allowed)."),
            str(job.run.path),
            _("Choose a type of more bits; or keep the file by `--no-check`."),
            file=(lora or model).name, same=result["same_tokens"], prompts=result["prompts"],
            texts=result["same_text"], ties=result["near_ties"], export=bits["export"],
            adapter=bits["adapter"], bound=result["bound"],
        )  # fmt: skip
    return result
