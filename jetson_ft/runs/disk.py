"""Disk space of a run: what it needs, and what killed processes left behind."""

from __future__ import annotations

from jetson_ft.errors import Message, _
from jetson_ft.files import cache_dir, expand_user, remove_abandoned, require_space
from jetson_ft.models.dims import ModelDims
from jetson_ft.recipe import Recipe
from jetson_ft.runs.store import Run

_WEIGHT_BYTES = 4  # of an adapter's weight in a file, fp32
_CHECKPOINT_BYTES = 12  # of the same with AdamW's two moments
_CACHES = (("data",), ("data", "hashes"), ("tokens",))


def checkpoint_bytes(recipe: Recipe, dims: ModelDims) -> int:
    """Return the bytes of the tensors in a run's checkpoints and adapter.

    These are the newest checkpoints, the best one, and one that is being written.
    """
    count = recipe.train.save_total_limit + 2
    weights = dims.lora_parameters(recipe.lora.rank, recipe.lora.target_modules)
    return weights * (count * _CHECKPOINT_BYTES + _WEIGHT_BYTES)


def require_checkpoint_space(recipe: Recipe, dims: ModelDims, run: Run | None = None) -> None:
    """Raise `DiskFull` if the disk has too little space for a run's checkpoints and adapter.

    Args:
        run: the run, whose older checkpoints count; None: a new one.
    """
    needed, place = checkpoint_bytes(recipe, dims), expand_user(recipe.output_dir)
    if run:
        files = (path for path in run.checkpoints.rglob("*") if path.is_file())
        needed -= sum(path.stat().st_size for path in files)
    purpose = Message(_("a run with this recipe, for its checkpoints and adapter,"))
    require_space(run.path if run else place, needed, purpose)


def remove_abandoned_files(run: Run) -> None:
    """Remove half-written files that killed processes left in the run's folder and the caches."""
    for folder in (run.path, *(cache_dir(*parts) for parts in _CACHES)):
        remove_abandoned(folder)
