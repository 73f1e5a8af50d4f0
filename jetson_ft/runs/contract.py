"""What a resumed run must keep: its settings, its rows, and its base model.

A resumed run ends as if it had never been interrupted. So everything that its result depends on is
compared with the last attempt; only its length may grow, and only the plan may change.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

from jetson_ft.data.prepare import PreparedRows
from jetson_ft.errors import Message, UserError, _, joined
from jetson_ft.files import quoted, read_json
from jetson_ft.models import files
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import Recipe
from jetson_ft.runs.store import Run

# The keys that may change on resume, and only upwards: the length of a run.
_LENGTH_KEYS = {"train.epochs", "train.max_steps", "train.max_minutes"}
# The keys that change how and when a step is computed, and not the result.
_PLAN_KEYS = {
    "train.max_memory_gb", "train.on_oom", "device.max_temperature_c", "run.auto_resume",
    "run.max_restarts",
}  # fmt: skip
# The keys that an adapter's weights are made for.
ADAPTER_KEYS = {
    "model", "quantize", "double_quantize", "lora.rank", "lora.alpha", "lora.target_modules",
    "lora.rslora", "lora.dora",
}  # fmt: skip
# Entries of a model's config that say how its files were written.
_NOT_COMPARED = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_OLD_FILES = _("Put the old files back, or start a new run.")
_OLD_FILES_OR_FORK = _("Put the old files back, or start a new run from this adapter: {command}")


def fork_command(run: Run, changes: dict[str, Any] | None = None) -> str:
    """Return the command that starts a new run from this one's adapter, with changed keys."""
    settings = []
    for key, value in (changes or {}).items():
        text = "null" if value is None else value
        settings.append(f"--set {quoted(f'{key}={text}')}")
    return " ".join(["jetson-ft train --fork", quoted(str(run.path)), *settings])


# --- settings ----------------------------------------------------------------------------------


def check_only_longer(run: Run, old: Recipe, new: Recipe) -> None:
    """Refuse a recipe with which a resumed run would have another result, or be shorter.

    The base model's path may change where its content is compared (`check_base`).
    """
    changes = old.diff(new)
    allowed = _PLAN_KEYS | _LENGTH_KEYS
    if (run.last_data() or {}).get("base"):
        allowed |= {"model"}
    others = {key: values for key, values in changes.items() if key not in allowed}
    if others:
        fix = _("Resume without it, or start a new run from this adapter: {command}")
        if others.keys() & (ADAPTER_KEYS | {"output_dir", "lora.initial_adapter"}):
            fix = _("Resume without it, or start a new run with it.")
        raise UserError(
            _("A resumed run must keep its settings; this would change {changes}."),
            str(run.path),
            fix,
            changes=describe_changes(others),
            command=fork_command(run, {key: after for key, (_old, after) in others.items()}),
        )
    for key, (before, after) in changes.items():
        # null means no limit
        if key in _LENGTH_KEYS and (after or math.inf) < (before or math.inf):
            raise UserError(
                _("A resumed run can only become longer; {key} would fall from {old} to {new}."),
                str(run.path),
                _("`jetson-ft runs stop` ends a run early."),
                key=key,
                old=before,
                new=after,
            )


def describe_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """Return the old and new value of each key, as text."""
    return ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())


# --- rows --------------------------------------------------------------------------------------


def check_rows(run: Run, last: dict[str, Any], rows: PreparedRows, ids_sha256: str) -> None:
    """Refuse rows, or token ids of them, that differ from the last attempt's."""
    if last["sha256"] != rows.report["sha256"]:
        what = _("The data has changed since this run began.")
    elif last.get("token_ids_sha256", ids_sha256) != ids_sha256:
        what = _("The tokenizer has changed since this run began: it splits the rows otherwise.")
    else:
        return
    where = run.recipe().data.train_names()
    raise UserError(what, where, _OLD_FILES_OR_FORK, command=fork_command(run))


def token_ids_sha256(rows: PreparedRows) -> str:
    """Return the hash of the token ids of all rows, in their order."""
    digest = hashlib.sha256()
    for part in (rows.train, rows.heldout):
        for chunk in part.data.column("input_ids").chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


# --- base model --------------------------------------------------------------------------------


def describe_base(base: BaseModelFiles, tokenizer: Any) -> dict[str, Any]:
    """Return what identifies a base model and its tokenizer, wherever the files are."""
    path = base.folder / "config.json"
    config = read_json(path) if path.is_file() and not base.gguf_file else {}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [vocabulary, sorted(map(str, tokenizer.special_tokens_map.items()))]
    return {
        "fingerprint": base.fingerprint(),
        "weights": base.weight_hashes(),
        "config": {key: value for key, value in config.items() if key not in _NOT_COMPARED},
        "tokens": len(vocabulary),
        "vocabulary": hashlib.sha256(repr(tokens).encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def check_base(run: Run, old: dict[str, Any], new: dict[str, Any], base: BaseModelFiles) -> None:
    """Refuse a base model that differs from the last attempt's (both by `describe_base`)."""
    weights = weight_changes(old["weights"], new["weights"])
    for key in sorted(old["config"].keys() | new["config"].keys()):
        before, after = old["config"].get(key), new["config"].get(key)
        if before != after:
            text = _("The base model's config.json has changed since this run began: {change}.")
            weights.append(Message(text, {"change": describe_changes({key: (before, after)})}))
    others = []
    if old["chat_template"] != new["chat_template"]:
        others.append(Message(_("The chat template has changed since this run began.")))
    more = new["tokens"] - old["tokens"]
    if old["vocabulary"] != new["vocabulary"]:
        text = _("The tokenizer has changed since this run began: other tokens.")
        if more > 0:
            text = _("The tokenizer has changed since this run began: {count} tokens added.")
        elif more < 0:
            text = _("The tokenizer has changed since this run began: {count} tokens removed.")
        others.append(Message(text, {"count": abs(more)}))
    if weights or others:
        fix = _OLD_FILES if weights else _OLD_FILES_OR_FORK
        values = {"command": fork_command(run)}
        raise UserError(joined([*weights, *others], " "), str(base.folder), Message(fix, values))


def check_moved_base(run: Run, model: str) -> None:
    """Refuse a base model with other weights than those that the run began with."""
    base = files.resolve_model(model)
    last = run.last_data()
    assert last and last["base"], "check_only_longer refuses the change without it"
    if changes := weight_changes(last["base"]["weights"], base.weight_hashes()):
        raise UserError(changes[0], str(base.folder), _OLD_FILES)


def weight_changes(old: dict[str, str], new: dict[str, str]) -> list[Message]:
    """Return a message that names the weight files that differ, or nothing.

    File names don't count: a file that was renamed or downloaded again is the same.
    """
    names = [name for name, value in new.items() if value not in old.values()]
    names += [name for name, value in old.items() if value not in new.values()]
    if not names:
        return []
    text = _("The base model's weights have changed since this run began: {files}.")
    return [Message(text, {"files": ", ".join(dict.fromkeys(names))})]
