"""Measure a base model, alone or with an adapter, on held-out rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft import adapter
from jetson_ft.data import sources, tokenize
from jetson_ft.data.prepare import prepare_rows
from jetson_ft.data.store import heldout_settings, read_source
from jetson_ft.errors import Message, UserError, _
from jetson_ft.export.llama import INSTALL_EXPORT
from jetson_ft.hardware import detect
from jetson_ft.models import files, loading, positions
from jetson_ft.models.loading import weight_format
from jetson_ft.recipe import Recipe
from jetson_ft.runs.exports import exported_run

if TYPE_CHECKING:
    from jetson_ft.inference.compare import ProgressCallback
    from jetson_ft.inference.reader import Reader

_PACK_TOKENS = 1024


def evaluate_model(
    recipe: Recipe, folder: Path | None, data: str | None, on_progress: ProgressCallback
) -> dict[str, Any]:
    """Compare base and adapter on the recipe's held-out rows, or on the rows of `data`.

    A GGUF file without an adapter is read by llama.cpp where it is installed. An export is measured
    with the tokenizer of its run, and on the held-out rows of its run.

    Args:
        recipe: names the base model, the format of its weights and the held-out rows.
        folder: of the adapter; None measures the model alone, as the side "before".

    Returns:
        `eval` and `generation` as in report.json, the `rows` of heldout.json, and the `reader`: the
        program that computed the figures.
    """
    from jetson_ft.inference import compare

    base = files.resolve_model(recipe.model)
    run = None if folder else exported_run(base.folder)
    if run:
        own = run.recipe()
        recipe = recipe.model_copy(update={"data": own.data, "eval": own.eval})
    is_gguf = folder is None and base.gguf_file is not None
    file = str(base.weight_files()[0]) if is_gguf else ""
    is_llama = is_gguf and importlib.util.find_spec("xllamacpp") is not None
    try:
        if origin := folder or (run and run.adapter):
            tokenizer = adapter.load_tokenizer(base, origin)
        else:
            tokenizer = loading.load_tokenizer(base, recipe.data.chat_template)
    except UserError as error:
        if not is_gguf:
            raise
        raise UserError(
            _("This GGUF file is no export of a run, and transformers can't read its tokenizer: "
              "{reason}"),
            file,
            _("What works: a GGUF export in its run's folder, any architecture; another GGUF file "
              "of Llama, Qwen 2 or 3, Gemma or another that transformers reads."),
            reason=error.what,
        ) from error  # fmt: skip
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
    if is_llama:
        from jetson_ft.export.llama_reader import LlamaReader

        reader = LlamaReader(Path(file), tokenizer)
        if longest > reader.max_tokens:
            raise positions.beyond_table(base.name, reader.max_tokens, longest)
        loading.check_vocabulary(tokenizer, reader.vocabulary, base, texts=encoded["input_ids"])
        sides: dict[str, Reader] = {"before": reader}
    else:
        try:
            sides = _load_sides(recipe, base, folder, tokenizer, encoded, longest)
        except UserError as error:
            if not is_gguf:
                raise
            raise error.with_fix(Message(INSTALL_EXPORT)) from error
    result = compare.compare_adapter(
        sides, tokenizer, conversations, list(encoded), recipe.eval.max_new_tokens,
        recipe.eval.samples, on_progress, recipe.data.max_length,
    )  # fmt: skip
    note = " (llama.cpp is not installed)" if is_gguf and not is_llama else ""
    return {"reader": sides["before"].name + note, **result}


def _load_sides(
    recipe: Recipe,
    base: files.BaseModelFiles,
    folder: Path | None,
    tokenizer: Any,
    encoded: Any,
    longest: int,
) -> dict[str, Reader]:
    """Return the sides of a model in transformers: base and adapter, or the base alone."""
    from jetson_ft.inference import compare
    from jetson_ft.inference.reader import ModelReader
    from jetson_ft.kernels.attention_trial import packing_obstacle

    positions.check_longest_row(base, longest)
    device = detect.detect_device()
    model = loading.load_model(base, weight_format(recipe, device), device.kind)
    vocabulary = len(model.get_input_embeddings().weight)
    loading.check_vocabulary(tokenizer, vocabulary, base, folder, encoded["input_ids"])
    if folder:
        model = adapter.load_adapter(model, base, folder)
    pack_tokens = 0 if packing_obstacle(model, longest) else _PACK_TOKENS
    reader = ModelReader(model, tokenizer, pack_tokens)
    return compare.adapter_sides(reader) if folder else {"before": reader}
