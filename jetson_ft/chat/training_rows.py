"""Questions and answers of the rows that a run was trained on, as few-shot examples."""

from __future__ import annotations

from pathlib import Path

from jetson_ft.chat import target
from jetson_ft.data.split import read_training
from jetson_ft.errors import UserError, _
from jetson_ft.files import expand_user
from jetson_ft.runs import exports

_CHARACTERS = 400  # of a question or an answer; longer ones crowd the context
_ROWS = 200  # that are looked through


def training_pairs(name: str, root: Path, count: int = 3) -> list[tuple[str, str]]:
    """Return short questions with their answers from the data of a run.

    Args:
        name: as in `target.resolve_target`, or an export of a run; a model of no run has the
            bundled rows.

    Raises:
        UserError: the data can't be read, or has no short row with one question and one answer.
    """
    run = exports.exported_run(expand_user(name)) or exports.exported_run(expand_user(name).parent)
    recipe = run.recipe() if run else target.resolve_target(name, root).recipe
    pairs: list[tuple[str, str]] = []
    for taken in read_training(recipe.data):
        for row in taken.all_rows.select(taken.indices[:_ROWS]):
            turns = [turn for turn in row["messages"] if turn["role"] != "system"]
            texts = [turn["content"] or "" for turn in turns]
            is_short = all(0 < len(text) <= _CHARACTERS for text in texts)
            if [turn["role"] for turn in turns] == ["user", "assistant"] and is_short:
                pairs.append((texts[0], texts[1]))
            if len(pairs) == count:
                return pairs
    if not pairs:
        raise UserError(
            _("The data has no short row with one question and one answer."),
            fix=_("Write the examples by hand."),
        )
    return pairs
