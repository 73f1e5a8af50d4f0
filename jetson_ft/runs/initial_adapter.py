"""The adapter that a run starts from in place of a new one: a fork, or continued training.

It is copied into the run's folder when the run is launched, so that neither a resume nor the report
needs the source. The copy is named `initial/`: PEFT's two files, and `source.json`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson_ft import adapter
from jetson_ft.errors import Message, UserError, _
from jetson_ft.files import disk_errors, expand_user, read_json, sha256_file, write_json
from jetson_ft.models.dims import ModelDims, starred
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import LoraRecipe, Recipe, parse_recipe
from jetson_ft.runs import contents, contract, store
from jetson_ft.runs.store import Run
from jetson_ft.training import checkpoint

_FOLDER, _SOURCE = "initial", "source.json"
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def fork_recipe(run: Run, overrides: list[str]) -> Recipe:
    """Return the run's recipe with overrides, which starts from the run's adapter.

    Raises:
        UserError: an override changes what the adapter's weights are made for, or the run has no
            weights yet.
    """
    old = run.recipe()
    new = parse_recipe(old.to_yaml(), str(run.path / "recipe.yaml"), overrides)
    changes = {key: values for key, values in old.diff(new).items() if key in contract.ADAPTER_KEYS}
    if changes:
        raise UserError(
            _("A fork must keep what the adapter's weights are made for; this would change "
              "{changes}."),
            str(run.path),
            _("Fork without it, or start a new run with it."),
            changes=contract.describe_changes(changes),
        )  # fmt: skip
    if not _is_finished(run) and not checkpoint.list_checkpoints(run.checkpoints):
        raise _no_weights(run)
    new.lora.initial_adapter = str(run.path)
    return new


def fork_label(run: Run) -> str:
    """Return what a fork's name says besides its time: the source's label and `fork`, once."""
    return f"{run.label.removesuffix('-fork')}-fork"


def _is_finished(run: Run) -> bool:
    return run.state().state == "finished" and run.adapter.is_dir()


def _weights_of_run(run: Run) -> tuple[Path, int | None]:
    """Return the folder of a run's newest weights and their step.

    The adapter of a finished run has its best step; else the newest intact checkpoint counts.
    """
    if _is_finished(run):
        return run.adapter, run.report()["train"]["best_step"]
    for folder in reversed(checkpoint.list_checkpoints(run.checkpoints)):
        if checkpoint.find_fault(folder) is None:
            return folder, checkpoint.step_of(folder)
    raise _no_weights(run)


def _no_weights(run: Run) -> UserError:
    return UserError(
        _("{run} has no weights yet: no checkpoint was written."),
        str(run.path),
        _("Let it reach its first checkpoint, or start a new run."),
        run=run.name,
    )


@dataclass(frozen=True)
class Source:
    """An adapter to start from: the folder of its files, and where it comes from."""

    folder: Path
    origin: dict[str, Any]  # of `source.json`, without the hash


def resolve(name: str) -> Source:
    """Return the adapter that `lora.initial_adapter` names; of a run, its newest weights.

    Resolve it once: of a run that trains, the next call may return other weights.
    """
    path = expand_user(name)
    run = Run(path.absolute())
    source: dict[str, Any] = {"path": str(run.path), "run": None, "step": None}
    folder = run.path
    if store.is_run(path):
        folder, step = _weights_of_run(run)
        source |= {"run": run.name, "step": step}
    base_file = folder / adapter.BASE_FILE
    if base_file.is_file():
        source["base"] = read_json(base_file).get("fingerprint")
    else:
        last = (run.last_data() if source["run"] else None) or {}
        source["base"] = (last.get("base") or {}).get("fingerprint")
    return Source(folder, source)


def check(source: Source, lora: LoraRecipe, dims: ModelDims) -> None:
    """Refuse an initial adapter that the recipe can't continue; no weights are loaded.

    Raises:
        UserError: no adapter, a pickled one, or one of another rank, scale, kind or other layers.
    """
    from safetensors import SafetensorError, safe_open

    folder = source.folder
    config = adapter.read_adapter_config(folder)
    expected = {
        "peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora,
        "use_dora": lora.dora, "bias": "none", "lora_bias": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None,
    }  # fmt: skip
    changes = {
        key: (config[key], value)
        for key, value in expected.items()
        if key in config and (config[key] or value) and config[key] != value
    }
    try:
        with safe_open(folder / _FILES[1], "pt") as tensors:
            names = list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, str(error)) from error
    layers = {starred(_layer_of(name)) for name in names}
    wanted = {group.path for group in dims.adapted(lora.target_modules)}
    if layers != wanted:
        changes["target_modules"] = (sorted(layers), sorted(wanted))
    if changes:
        raise UserError(
            _("The initial adapter doesn't fit the recipe; this would change {changes}."),
            str(folder),
            _("Give the recipe the adapter's settings, or start with a new adapter."),
            changes=contract.describe_changes(changes),
        )


def _layer_of(name: str) -> str:
    """Return the path of the layer that a tensor of an adapter's file belongs to."""
    path = name.removeprefix("base_model.model.")
    return path.partition(".lora_")[0]


def copy_into(run: Run, source: Source) -> None:
    """Copy the adapter's files into the run's folder, with where they come from."""
    target = run.path / _FOLDER
    with disk_errors(target):
        target.mkdir()
        for file in _FILES:
            shutil.copyfile(source.folder / file, target / file)
    write_json(target / _SOURCE, {**source.origin, "sha256": sha256_file(target / _FILES[1])})


def source_of(run: Run) -> dict[str, Any] | None:
    """Return where the run's initial adapter comes from; None for a new one."""
    path = run.path / _FOLDER / _SOURCE
    return contents.read_object(path, contents.InitialAdapter) if path.is_file() else None


def load_into(model: Any, run: Run, base: BaseModelFiles) -> None:
    """Put the initial adapter's weights into a model that has an adapter.

    Raises:
        UserError: the copy is damaged or missing, or made for another base or adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = source_of(run)
    folder = run.path / _FOLDER
    path = folder / _FILES[1]
    if source is None or not path.is_file() or sha256_file(path) != source["sha256"]:
        raise _damaged(folder, Message(_("its SHA-256 differs")))
    if source["base"] not in (None, base.fingerprint()):
        raise UserError(
            _("The initial adapter was made for another base than {model}."),
            source["path"],
            _("Train it with its own base model, or start with a new adapter."),
            model=base.name,
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise _damaged(folder, str(error)) from error
    own = get_peft_model_state_dict(model)
    shapes, own_shapes = ({k: v.shape for k, v in each.items()} for each in (tensors, own))
    if shapes != own_shapes:
        names = sorted(k for k in {*shapes, *own_shapes} if shapes.get(k) != own_shapes.get(k))
        raise UserError(
            _("The initial adapter has other weights than the recipe's adapter: {names}."),
            source["path"],
            _("Give the recipe the adapter's settings, or start with a new adapter."),
            names=", ".join(names[:3]),
        )
    set_peft_model_state_dict(model, tensors)


def _damaged(folder: Path, reason: str | Message) -> UserError:
    return UserError(
        _("The initial adapter is damaged: {reason}."),
        str(folder),
        _("Start a new run from an intact copy of it."),
        reason=reason,
    )
