"""Measure a base model, alone or with an adapter, on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft import adapter
from jetson_ft.data import sources, tokenize
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.data.store import heldout_settings, read_source
from jetson_ft.hardware import detect
from jetson_ft.models import files, loading, positions
from jetson_ft.models.loading import weight_format
from jetson_ft.recipe import Recipe

if TYPE_CHECKING:
    from jetson_ft.inference.compare import ProgressCallback

_PACK_TOKENS = 1024


def evaluate_model(
    recipe: Recipe, folder: Path | None, data: str | None, on_progress: ProgressCallback
) -> dict[str, Any]:
    """Compare base and adapter on the recipe's held-out rows, or on the rows of `data`.

    Args:
        recipe: names the base model, the format of its weights and the held-out rows.
        folder: of the adapter; None measures the model alone, as the side "before".

    Returns:
        `eval` and `generation` as in report.json, and the `rows` of heldout.json.
    """
    from jetson_ft.inference import compare
    from jetson_ft.kernels.attention_trial import packing_obstacle

    base = files.resolve_model(recipe.model)
    tokenizer = (
        adapter.load_tokenizer(base, folder)
        if folder
        else loading.load_tokenizer(base, recipe.data.chat_template)
    )
    if data is None:
        rows = prepare_rows(recipe.data, tokenizer)
        conversations, encoded = list(rows.heldout_messages), rows.heldout
    else:
        source = sources.resolve_source(data)
        layout, columns = heldout_settings(source, recipe.data)
        messages, report = read_source(
            source, layout=layout, on_invalid=recipe.data.on_invalid, columns=columns
        )
        encoded, _report = tokenize.tokenize_rows(
            messages, report.cache_key, tokenizer, recipe.data.max_length,
            on_invalid=recipe.data.on_invalid, source=data,
        )  # fmt: skip
        numbers = set(encoded["row"])
        conversations = [row for row in messages if row["row"] in numbers]
    longest = int(tokenize.token_counts(encoded).max())
    positions.check_longest_row(base, longest)
    device = detect.detect_device()
    model = loading.load_model(base, weight_format(recipe, device), device.kind)
    vocabulary = len(model.get_input_embeddings().weight)
    loading.check_vocabulary(tokenizer, vocabulary, base, folder, encoded["input_ids"])
    if folder:
        model = adapter.load_adapter(model, base, folder)
    pack_tokens = 0 if packing_obstacle(model, longest) else _PACK_TOKENS
    return compare.compare_adapter(
        model, tokenizer, conversations, list(encoded), pack_tokens, recipe.eval.max_new_tokens,
        recipe.eval.samples, on_progress, recipe.data.max_length,
        sides=compare.BOTH_SIDES if folder else compare.BOTH_SIDES[:1],
    )  # fmt: skip
