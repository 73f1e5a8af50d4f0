"""Attach the LoRA adapter to a base model, save it, and load it for the right base only."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_errors, read_json, write_json
from jetson_ft.models import loading
from jetson_ft.models.code_check import check_folder
from jetson_ft.models.dims import ModelDims, starred
from jetson_ft.models.files import BaseModelFiles, has_tokenizer
from jetson_ft.models.layers import linear_layers
from jetson_ft.recipe import LoraRecipe

if TYPE_CHECKING:
    from peft import PeftModel

BASE_FILE, WEIGHTS_FILE = "base.json", "adapter_model.safetensors"


def attach_adapter(model: Any, lora: LoraRecipe, seed: int, fused: bool = True) -> PeftModel:
    """Attach a new adapter (fp32 for any base) to the model, in place.

    Args:
        fused: with the layers of `kernels.lora_linear` and `kernels.dropout`; else with PEFT's.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from jetson_ft.kernels.dropout import replace_adapter_dropout
    from jetson_ft.kernels.lora_linear import register_layers

    paths = _target_paths(model, lora.target_modules)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes (0.50) repacks nf4 weights at the first evaluation on a CPU. The
            # packed form has no backward pass: a model that is evaluated before training would
            # silently get no gradient through its frozen layers.
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=paths,
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in paths),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )
    if fused:
        register_layers(config)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    if fused:
        replace_adapter_dropout(peft_model)
    return peft_model


def _target_paths(model: Any, targets: str | list[str]) -> list[str]:
    """Return the paths of the layers that get an adapter."""
    paths = [path for path, reason in linear_layers(model).items() if not reason]
    names = _target_names(targets)
    _check_targets(paths, {name: name for name in names})
    ends = tuple(f".{name}" for name in names) or ("",)
    return [path for path in paths if f".{path}".endswith(ends)]


def check_target_modules(dims: ModelDims, targets: str | list[str]) -> None:
    """Check the recipe's `target_modules` against a model's dimensions; no weights are needed.

    Raises:
        UserError: a name is no layer that can have an adapter, or the model has no such layer.
    """
    paths = [group.path for group in dims.linears if not group.no_adapter]
    ends: dict[str, str] = {}
    for name in _target_names(targets):
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        is_in_range = max(numbers, default=0) < dims.layers
        ends[starred(name) if is_in_range else name] = name
    _check_targets(paths, ends)


def _target_names(targets: str | list[str]) -> list[str]:
    if targets == "all-linear":
        return []
    return [targets] if isinstance(targets, str) else targets


def _check_targets(paths: list[str], wanted: dict[str, str]) -> None:
    """Check that each key is the end of a path, at a dot, as in PEFT; messages show the value."""
    if not paths:
        raise UserError(
            _("No layer of this model can have an adapter."),
            "lora.target_modules",
            _("Choose another model."),
        )
    linear = sorted({path.rsplit(".", 1)[-1] for path in paths})
    unknown = [
        name for end, name in wanted.items() if not any(f".{p}".endswith(f".{end}") for p in paths)
    ]
    if unknown:
        near: list[str] = []
        for name in unknown:
            near += difflib.get_close_matches(name.rsplit(".", 1)[-1], linear, 1)
        fix = _("It has: {linear}; or write all-linear.")
        raise UserError(
            _("The model has no linear layer named {unknown}."),
            "lora.target_modules",
            _("Did you mean {near}? It has: {linear}; or write all-linear.") if near else fix,
            unknown=", ".join(unknown),
            near=", ".join(near),
            linear=", ".join(linear),
        )


def save_adapter(model: Any, tokenizer: Any, base: BaseModelFiles, folder: Path) -> None:
    """Write adapter, tokenizer and base, as plain `PeftModel.from_pretrained` loads them."""
    with disk_errors(folder):
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        stored = {"name": base.name, "folder": str(base.folder), "fingerprint": base.fingerprint()}
        write_json(folder / BASE_FILE, stored)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration.

    Raises:
        UserError: no adapter, a pickled one, or one whose files choose code.
    """
    config_file = folder / "adapter_config.json"
    if not config_file.exists():
        raise UserError(_("No adapter found."), str(folder), _("Name a run, or a PEFT folder."))
    check_folder(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            _("The adapter has no adapter_model.safetensors; pickled weights are refused."),
            str(folder),
            _("Save it again with PEFT's `save_pretrained`, which writes safetensors."),
        )
    return dict(read_json(config_file))


def load_adapter(
    model: Any, base: BaseModelFiles, folder: Path, name: str = "default"
) -> PeftModel:
    """Attach a saved adapter to the model, in evaluation mode.

    A model that has adapters already gets another one; `name` tells them apart.

    Raises:
        UserError: no adapter, a pickled one, or one trained for another base.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    config = read_adapter_config(folder)
    check_base(base, folder)
    try:
        _check_trained_tokens(model, base, folder, config)
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, name).eval()
        model.load_adapter(str(folder), name)
        return model.eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            _("The adapter doesn't fit the model {model}, or is damaged: {error}"),
            str(folder),
            model=base.name,
            error=" ".join(line.strip() for line in str(error).splitlines()[:2]),
        ) from error


@contextmanager
def adapter_context(loaded: Any, use_adapter: bool) -> Iterator[None]:
    """Compute with the adapter of a loaded model within the context, or with its base alone.

    Args:
        loaded: a `chat.session.ChatSession` or the like: `model`, `has_adapter`, `adapter_name`.
    """
    disabled: Any = nullcontext()
    if use_adapter and loaded.has_adapter:
        loaded.model.set_adapter(loaded.adapter_name)
    elif hasattr(loaded.model, "disable_adapter"):  # a PeftModel, perhaps with others' adapters
        disabled = loaded.model.disable_adapter()
    with disabled:
        yield


def check_base(base: BaseModelFiles, folder: Path) -> None:
    """Refuse another base than the adapter's; adapters of other programs have no fingerprint."""
    if not (folder / BASE_FILE).is_file():
        return
    stored = read_json(folder / BASE_FILE)
    trained_for, fingerprint = str(stored.get("fingerprint")), base.fingerprint()
    if trained_for != fingerprint:
        raise UserError(
            _("This adapter was made for another base: {name}, not {model}."),
            str(folder),
            _("Load it with `--model {base}`."),
            name=f"{stored.get('name')} ({trained_for[:12]})",
            model=f"{base.name} ({fingerprint[:12]})",
            base=stored.get("name"),
        )


def _check_trained_tokens(
    model: Any, base: BaseModelFiles, folder: Path, config: dict[str, Any]
) -> None:
    """Refuse an adapter with weights for more tokens than the model has embeddings."""
    from safetensors import safe_open

    rows, width = model.get_input_embeddings().weight.shape
    indices = config.get("trainable_token_indices") or []  # of the embedding, or by layer
    lists = indices.values() if isinstance(indices, dict) else [indices]
    tokens = max((index + 1 for numbers in lists for index in numbers), default=0)
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module in parts]
    with safe_open(folder / WEIGHTS_FILE, "pt") as tensors:
        for key in sorted(tensors.keys()):
            if any(f".{name}." in key for name in names):
                # A tensor's sizes are the vocabulary's, the model's width and the rank.
                sizes = tensors.get_slice(key).get_shape()
                tokens = max(tokens, *(size for size in sizes if size > width), 0)
    if tokens > rows:
        raise UserError(
            _("The adapter has weights for {tokens:,} tokens, but {model} has only {rows:,}."),
            str(folder),
            loading.MERGE_ADAPTER,
            tokens=tokens,
            model=base.name,
            rows=rows,
        )


def find_base_name(folder: Path) -> tuple[str | None, Path]:
    """Return the name of the adapter's base model, and the file that has it."""
    file, key = folder / BASE_FILE, "name"
    if not file.is_file():  # an adapter of another program has PEFT's entry only
        file, key = folder / "adapter_config.json", "base_model_name_or_path"
    values = read_json(file)
    name = values.get(key) if isinstance(values, dict) else None
    return name if name and isinstance(name, str) else None, file


def base_warning(base: BaseModelFiles, folder: Path) -> Message | None:
    """Return a warning if the adapter may be for another base, but has no fingerprint of it."""
    name, file = find_base_name(folder)
    if file.name == BASE_FILE or name in (None, base.name, str(base.folder)):
        return None
    template = _(
        "Warning: the adapter was made for {name}. Whether {model} is the same model can't be "
        "checked: the adapter has no fingerprint of it."
    )
    return Message(template, {"name": name, "model": base.name})


def load_tokenizer(base: BaseModelFiles, folder: Path) -> Any:
    """Return the tokenizer and chat template saved with the adapter, else the base's.

    It may have tokens that the base model has no embeddings for: see `loading.check_vocabulary`.

    Raises:
        UserError: the tokenizer can't be loaded.
    """
    own_template = folder / "chat_template.jinja"
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or not has_tokenizer(folder):
        template = str(own_template) if own_template.is_file() else None
        return loading.load_tokenizer(base, template)
    tokenizer = loading.load_tokenizer(BaseModelFiles(base.name, folder))
    if not own_template.is_file() and "chat_template" not in read_json(settings):
        tokenizer.chat_template = loading.load_tokenizer(base).chat_template
    return tokenizer
