"""The models that can be chatted with, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from jetson_ft import adapter
from jetson_ft.chat import memory_guard
from jetson_ft.chat.session import ChatSession
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import expand_user, refuse_special
from jetson_ft.hardware import detect
from jetson_ft.models import fast_import, files, loading, positions
from jetson_ft.models.loading import weight_format
from jetson_ft.recipe import Quantization, Recipe
from jetson_ft.runs import store
from jetson_ft.runs.store import Run

_UNKNOWN_CONTEXT = 2048  # tokens, where a model's config names no limit


@dataclass(frozen=True)
class ChatTarget:
    """The model of a chat: the recipe's base, in its format, and perhaps an adapter."""

    recipe: Recipe
    adapter_dir: Path | None = None
    # Times of the weights' last change; 0 until `with_weight_times` has read them.
    adapter_mtime_ns: int = 0
    base_mtime_ns: int = 0  # of a local folder or GGUF file
    named_in: Path | None = None  # the adapter's file that names the base

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file that llama.cpp computes; None: torch computes the model."""
        file = expand_user(self.recipe.model)
        return file if file.suffix == ".gguf" and self.adapter_dir is None else None


def resolve_target(
    name: str, root: Path, model: str | None = None, quantize: str | None = None
) -> ChatTarget:
    """Return the model that a name stands for; nothing is loaded or downloaded.

    Args:
        name: a run (name or path), `latest` (the newest run with an adapter), an adapter's folder,
            `base` (the embedded model), or what a recipe accepts as `model`.
        root: the folder of the runs.
        model: another base model than the one that the name implies.
        quantize: another format of its weights.

    Raises:
        UserError: there is no such run or model, or the run has no adapter yet.
    """
    if quantize not in (None, *get_args(Quantization)):
        choices = ", ".join(get_args(Quantization))
        what, fix = _("quantize can't be {quantize!r}."), _("Choose one of {choices}.")
        raise UserError(what, fix=fix, quantize=quantize, choices=choices)
    adapter_dir = named_in = None
    refuse_special(expand_user(name))
    if files.is_base_model(name):
        recipe = Recipe() if name == "base" else Recipe(model=name)
    elif (expand_user(name) / "adapter_config.json").is_file():
        adapter_dir = expand_user(name)
        base, file = adapter.find_base_name(adapter_dir)
        if not (base or model):
            what = _("The adapter names no base model.")
            raise UserError(what, str(file), _("Name it with `--model NAME`."))
        recipe, named_in = Recipe(model=model or base or ""), None if model else file
    else:
        run = _latest_adapter_run(root) if name == "latest" else store.find_run(name, root)
        adapter_dir, recipe = run.require_adapter(), run.recipe()
    changes = {"model": model or recipe.model, "quantize": quantize or recipe.quantize}
    return ChatTarget(recipe.model_copy(update=changes), adapter_dir, named_in=named_in)


def with_weight_times(target: ChatTarget) -> ChatTarget:
    """Return the target with the times of its weights' last change.

    It reads the base's folder: call it only where that path may be read.
    """
    base = expand_user(target.recipe.model)
    weights = [target.adapter_dir / "adapter_model.safetensors"] if target.adapter_dir else []
    return replace(
        target,
        adapter_mtime_ns=_newest_mtime_ns(weights),
        base_mtime_ns=_newest_mtime_ns([base, *base.glob("*.safetensors"), *base.glob("*.gguf")]),
    )


def _newest_mtime_ns(files: list[Path]) -> int:
    """Return the time of the newest file's last change; 0: there is none."""
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)


def shares_base(first: ChatTarget, second: ChatTarget) -> bool:
    """Return whether both have the same base in the same format, which torch computes."""
    keys = ("model", "quantize", "double_quantize", "precision")
    return (
        not (first.gguf_file or second.gguf_file)
        and first.base_mtime_ns == second.base_mtime_ns
        and all(getattr(first.recipe, key) == getattr(second.recipe, key) for key in keys)
    )


def open_session(target: ChatTarget, loaded: Any = None) -> ChatSession:
    """Load the target's model, and return a chat with it.

    Args:
        loaded: the base in memory, perhaps with other adapters; None: it is loaded.

    Raises:
        UserError: a file is missing, the adapter is for another base, or memory is short.
    """
    name, adapter_dir = target.recipe.model, target.adapter_dir
    device = detect.detect_device()
    weights = weight_format(target.recipe, device)
    if target.named_in:
        try:
            files.resolve_model(name, weights=False)
        except UserError as error:
            values = {"name": name, "file": str(target.named_in)}
            fix = Message(_("Name the adapter's base model with `--model NAME`."))
            where = Message(_("{name}, named in {file}"), values)
            raise error.with_fix(fix, where=where) from error
    if loaded is None:
        memory_guard.require_memory(name, weights, device)
    base = files.resolve_model(name)
    if adapter_dir:
        adapter.read_adapter_config(adapter_dir)
    fast_import.import_libraries()
    tokenizer = (
        adapter.load_tokenizer(base, adapter_dir) if adapter_dir else loading.load_tokenizer(base)
    )
    model = loading.load_model(base, weights, device.kind) if loaded is None else loaded
    vocabulary = len(model.get_input_embeddings().weight)
    loading.check_vocabulary(tokenizer, vocabulary, base, adapter_dir)
    adapter_name = "default"
    if adapter_dir:
        taken = getattr(model, "peft_config", {})
        adapter_name = next(n for n in map("adapter{}".format, range(99)) if n not in taken)
        model = adapter.load_adapter(model, base, adapter_dir, adapter_name)
    context_length = positions.max_positions(model.config) or _UNKNOWN_CONTEXT
    with_adapter = f" with {adapter_dir}" if adapter_dir else ""
    title = f"{name}{with_adapter} ({weights}, {device.kind})"
    warning = adapter.base_warning(base, adapter_dir) if adapter_dir else None
    return ChatSession(
        model, tokenizer, adapter_dir is not None, context_length, title, adapter_name,
        warning=warning, recipe=target.recipe,
    )  # fmt: skip


def _latest_adapter_run(root: Path) -> Run:
    if runs := store.runs_with_adapter(root):
        return runs[0]
    fix = _("`make finetune` makes one; `base` names the bundled model as it is.")
    raise UserError(_("There is no adapter yet."), str(root), fix)
