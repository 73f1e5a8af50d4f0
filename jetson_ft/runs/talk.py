"""A finished run put to use: chatting with its adapter, and measuring it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.data import read, store, tokens
from jetson_ft.device import probe
from jetson_ft.errors import UserError
from jetson_ft.inference import chat
from jetson_ft.models import adapter, attention, load, resolve
from jetson_ft.models.packing import packs
from jetson_ft.paths import read_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs import beside, rundir
from jetson_ft.runs.pipeline import prepare_rows, weights_of
from jetson_ft.runs.rundir import Run

if TYPE_CHECKING:
    from jetson_ft.inference.evaluate import Listener

_CAPACITY = 1024  # tokens in a pack when measuring


@dataclass(frozen=True)
class Partner:
    """Whom a chat is with: a base, as a recipe names and keeps it, and perhaps an adapter."""

    recipe: Recipe
    folder: Path | None = None
    written: int = 0  # when the adapter was, ns since 1970: another one may take its place


def find(name: str, root: Path, model: str | None = None, quantize: str | None = None) -> Partner:
    """Whom a name means; nothing is loaded or fetched.

    Args:
        name: of a run or an adapter's folder, or what a recipe may name as `model`; `latest`
            is the newest run with an adapter, `base` the embedded model.
        model: another base.
        quantize: another format of its weights.

    Raises:
        UserError: there is nothing of that name, or it has no adapter yet.
    """
    if quantize not in (None, "none", "int8", "nf4"):
        raise UserError(f"quantize can't be {quantize!r}.", fix="One of none, int8, nf4.")
    folder, recipe = (None, _alone(name)) if resolve.is_base(name) else _adapter_of(name, root)
    changes = {"model": model or recipe.model, "quantize": quantize or recipe.quantize}
    weights = folder / "adapter_model.safetensors" if folder else None
    written = weights.stat().st_mtime_ns if weights and weights.exists() else 0
    return Partner(recipe.model_copy(update=changes), folder, written)


def begin(partner: Partner) -> tuple[chat.Chat, str]:
    """Loads the model.

    Returns:
        The chat, and a line on what it talks with.

    Raises:
        UserError: it can't be loaded, or there is no room for it beside a run.
    """
    base, device = partner.recipe.model, probe.probe()
    weights = weights_of(partner.recipe, device)
    beside.require_room(base, weights, device)
    opened = chat.open_chat(base, weights, device.kind, partner.folder)
    with_adapter = f" with {partner.folder}" if partner.folder else ""
    return opened, f"{base}{with_adapter} ({weights}, {device.kind})"


def _alone(name: str) -> Recipe:
    return Recipe() if name == "base" else Recipe(model=name)


def _adapter_of(name: str, root: Path) -> tuple[Path, Recipe]:
    """Adapter folder and recipe of what a person named."""
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        return path, Recipe(model=_base_of(path))
    run = _newest_with_adapter(root) if name == "latest" else rundir.find(name, root)
    if not run.adapter.is_dir():
        raise UserError(
            f"{run.name} has no adapter yet ({run.state().state}).",
            str(run.path),
            "Let it finish, or name another run (`jetson-ft runs list`).",
        )
    return run.adapter, run.recipe()


def _base_of(folder: Path) -> str:
    """The base that an adapter says it was made for; ours say it better than PEFT does."""
    if (folder / adapter.BASE_FILE).is_file():
        return str(read_json(folder / adapter.BASE_FILE)["name"])
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "embedded"


def _newest_with_adapter(root: Path) -> Run:
    for run in rundir.list_runs(root):
        if run.adapter.is_dir():
            return run
    raise UserError(
        "There is no adapter to talk with yet.",
        str(root),
        "`make finetune` makes one; `jetson-ft chat base` talks with the model as it is.",
    )


def evaluate_run(run: Run, data: str | None, progress: Listener) -> dict[str, Any]:
    """Base and adapter on the run's held-out rows, or on those of `data`.

    Returns:
        `eval` and `generation` as in report.json.
    """
    from jetson_ft.inference import evaluate

    recipe = run.recipe()
    if not run.adapter.is_dir():
        raise UserError(f"{run.name} has no adapter yet.", str(run.path), "Let it finish.")
    base = resolve.resolve(recipe.model)
    device = probe.probe()
    weights = weights_of(recipe, device)
    conversations, encoded, tokenizer = _rows(recipe, base, data)
    model = adapter.load(load.load_model(base, weights, device.kind), base, run.adapter)
    capacity = _CAPACITY if attention.supports_packing(model) else 0
    return evaluate.compare(
        model, tokenizer, conversations, list(packs(list(encoded), capacity)),
        int(sum(encoded["answer_characters"])), recipe.eval.max_new_tokens, recipe.eval.samples,
        progress,
    )  # fmt: skip


def _rows(recipe: Recipe, base: resolve.Base, data: str | None) -> tuple[list[Any], Any, Any]:
    if data is None:
        rows = prepare_rows(recipe, base)
        return list(rows.heldout_messages["messages"]), rows.heldout, rows.tokenizer
    tokenizer = load.load_tokenizer(base)
    messages, found = store.read(read.resolve(data), bad_rows=recipe.data.bad_rows)
    key = f"{found.sha256}-{found.layout}-{recipe.data.bad_rows}-eval"
    encoded, _ = tokens.tokenise(messages, key, tokenizer, recipe.data.max_length)
    kept = set(encoded["row"])
    return [row["messages"] for row in messages if row["row"] in kept], encoded, tokenizer
