"""The view of a run's settings: what differs from the defaults, or between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from jetson_ft import recipe as recipes
from jetson_ft.errors import UserError, _
from jetson_ft.recipe import Recipe
from jetson_ft.runs.store import Run, short_titles
from jetson_ft.webui.render import Locale, render

# Without `output_dir`: the page's own folder of runs is used.
SETTINGS = {
    key: field for key, field in recipes.fields().items() if key not in ("version", "output_dir")
}
_GROUPS = {
    "": _("Model"), "data": _("Data"), "lora": _("LoRA"), "train": _("Training"),
    "eval": _("Evaluation"), "device": _("Device"), "run": _("After an interruption"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A recipe's key in each of some runs."""

    key: str
    title: str  # empty where the schema has none
    values: list[str]
    changed: list[bool]  # against the default
    default: str  # of the first run
    differs: bool  # among the runs


def render_settings(t: Locale, runs: Sequence[Run], query: Mapping[str, str]) -> str:
    """Return the view of the settings of a run, or of several side by side."""
    chosen = [(runs[0], runs[0].recipe())]
    for run in runs[1:]:
        with suppress(UserError):
            chosen.append((run, run.recipe()))
    only, groups = "only" in query, {}
    settings = _setting_rows(t, [recipe for _run, recipe in chosen])
    for name, title in _GROUPS.items():
        rows = [row for row in settings if row.key.rpartition(".")[0].split(".")[0] == name]
        if only:
            rows = [row for row in rows if (row.differs if len(chosen) > 1 else row.changed[0])]
        if rows:
            groups[title] = rows
    titles = short_titles([run for run, _recipe in chosen]) if len(chosen) > 1 else []
    return render("run_settings.jinja", t, groups=groups, titles=titles, only=only)


def _setting_rows(t: Locale, chosen: Sequence[Recipe]) -> list[Setting]:
    rows = []
    for key, field in SETTINGS.items():
        read = attrgetter(key)
        values = [setting_text(t, read(recipe)) for recipe in chosen]
        defaults = [setting_text(t, read(Recipe()))] * len(chosen)
        if key == "lora.alpha":  # null, which follows the rank
            defaults = [setting_text(t, 2.0 * recipe.lora.rank) for recipe in chosen]
        changed = [value != default for value, default in zip(values, defaults, strict=True)]
        title = t(field.title) if field.title else ""
        rows.append(Setting(key, title, values, changed, defaults[0], len({*values}) > 1))
    return rows


def setting_text(t: Locale, value: Any) -> str:
    """Return a setting's value as text for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return t(_("yes")) if value else t(_("no"))
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
