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


def attach(model: Any, lora: LoraRecipe, seed: int) -> PeftModel:
    """Puts a fresh adapter (fp32, whatever the base) on the model, in place.

    Raises:
        UserError: `lora.targets` names layers that the model doesn't have.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora.targets)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def _check_targets(model: Any, targets: str | list[str]) -> None:
    import torch

    if targets == "all-linear":
        return
    wanted = [targets] if isinstance(targets, str) else targets
    linear = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
    unknown = [name for name in wanted if name.rsplit(".", 1)[-1] not in linear]
    if unknown or not wanted:
        near = [match for name in unknown for match in difflib.get_close_matches(name, linear, 1)]
        raise UserError(
            f"The model has no linear layer named {', '.join(unknown) or '(none given)'}.",
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
            "This adapter's weights are not safetensors; pickled ones are refused.", str(folder)
        )
    return dict(read_json(folder / "adapter_config.json"))


def load(model: Any, base: Base, folder: Path) -> PeftModel:
    """Puts a saved adapter on the model, in evaluation mode.

    Raises:
        UserError: no adapter, a pickled one, or one made for another base.
    """
    from peft import PeftModel

    check_folder(folder)
    if (folder / BASE_FILE).is_file():
        made_for = read_json(folder / BASE_FILE)
        if made_for["fingerprint"] != base.fingerprint():
            raise UserError(
                f"This adapter was made for another base: {made_for['name']} "
                f"({made_for['fingerprint'][:12]}), not {base.name} ({base.fingerprint()[:12]}).",
                str(folder),
                f"Load it with `--model {made_for['name']}`.",
            )
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter doesn't fit the model {base.name}: {str(error).splitlines()[0]}",
            str(folder),
        ) from error
