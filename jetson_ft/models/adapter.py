"""The LoRA adapter: put on a base model, written, and loaded again for the right base only."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError
from jetson_ft.models.resolve import Base
from jetson_ft.paths import disk_errors, read_json, write_json
from jetson_ft.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import PeftModel

BASE_FILE = "base.json"


def attach(model: Any, lora: LoraRecipe, seed: int, fused: bool = True) -> PeftModel:
    """Puts a fresh adapter (fp32, whatever the base) on the model, in place.

    Args:
        fused: with the layers of `models.lora`; else with PEFT's own.

    Raises:
        UserError: `lora.targets` names layers that the model doesn't have.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from jetson_ft.models.lora import register

    targets = lora.targets
    if targets != "all-linear":
        # A single name goes as a list too: PEFT takes a string for a pattern.
        targets = [targets] if isinstance(targets, str) else targets
        _check_targets(model, targets)
    _keep_trainable(model)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    if fused:
        register(config)
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def _keep_trainable(model: Any) -> None:
    """Keeps bitsandbytes from repacking nf4 weights at the first evaluation on a CPU.

    The packed form (for AVX512-BF16, bitsandbytes 0.50) has no backward pass: a model measured
    before it is trained would get no gradient through its frozen layers, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_targets(model: Any, wanted: list[str]) -> None:
    """A layer is named as PEFT names it: by the end of its path, at a dot."""
    import torch

    paths = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = sorted({path.rsplit(".", 1)[-1] for path in paths})
    unknown = [name for name in wanted if not any(f".{p}".endswith(f".{name}") for p in paths)]
    if unknown:
        near = [
            match
            for name in unknown
            for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], linear, 1)
        ]
        raise UserError(
            f"The model has no linear layer named {', '.join(unknown)}.",
            "lora.targets",
            (f"Did you mean {', '.join(near)}? " if near else "")
            + f"It has: {', '.join(linear)}; or write all-linear.",
        )


def save(model: Any, tokenizer: Any, base: Base, folder: Path) -> None:
    """Writes adapter, tokenizer and template, and which base they belong to.

    The folder loads with plain `PeftModel.from_pretrained(base_model, folder)`.
    """
    with disk_errors(folder):
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        write_json(folder / BASE_FILE, describe_base(base))


def describe_base(base: Base) -> dict[str, str]:
    """What `load` compares: the base's name, folder and fingerprint."""
    return {"name": base.name, "folder": str(base.folder), "fingerprint": base.fingerprint()}


def check_folder(folder: Path) -> dict[str, Any]:
    """The adapter's configuration; refuses what is no adapter, or a pickled one."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError("No adapter lies there.", str(folder), "Name a run, or a PEFT folder.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            "The adapter has no adapter_model.safetensors; pickled weights are refused.",
            str(folder),
            "Save it again with PEFT's `save_pretrained`, which writes safetensors.",
        )
    return dict(read_json(folder / "adapter_config.json"))


def load(model: Any, base: Base, folder: Path) -> PeftModel:
    """Puts a saved adapter on the model, in evaluation mode.

    Raises:
        UserError: no adapter, a pickled one, or one made for another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    _check_base(base, folder, check_folder(folder))
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(
            f"The adapter doesn't fit the model {base.name}, or is damaged: {said}", str(folder)
        ) from error


def _check_base(base: Base, folder: Path, config: dict[str, Any]) -> None:
    """Refuses another base than the adapter was made for.

    Ours are told apart by their content; of an adapter that other software made, only the
    base's name is known.
    """
    if (folder / BASE_FILE).is_file():
        told = read_json(folder / BASE_FILE)
        name, its = told.get("name"), str(told.get("fingerprint"))
        if its == base.fingerprint():
            return
        what = (
            f"This adapter was made for another base: {name} ({its[:12]}), not {base.name} "
            f"({base.fingerprint()[:12]})."
        )
        fix = f"Load it with `--model {name}`."
    else:
        name = config.get("base_model_name_or_path")
        if not name or name in (base.name, str(base.folder)):
            return
        what = f"This adapter was made for another base: {name}, not {base.name}."
        fix = (
            f"Load it with `--model {name}`; if both are the same model, write {base.name} as "
            "base_model_name_or_path into its adapter_config.json."
        )
    raise UserError(what, str(folder), fix)
