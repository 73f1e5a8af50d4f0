"""What the Train tab's form does: its fields are a recipe's keys, its values a recipe.

The browser knows which values the chosen recipe has and marks what differs from them; it keeps the
draft (static/train_form.js). Here are the ways from values to a recipe and back.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from jetson_ft import recipe as recipes
from jetson_ft.errors import Problem, RecipeError, UserError, _
from jetson_ft.files import quoted
from jetson_ft.recipe import Recipe, strict_yaml
from jetson_ft.runs import store
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, error_html
from jetson_ft.webui.run_settings import SETTINGS

HTML = partial(gr.HTML, apply_default_css=False, padding=False)
FIRST = "quickstart-zh"  # the recipe that a new form starts from
DATA = "data.train"


class Form:
    """A form in one language.

    `marks` is a hidden box; put it into the outputs for what `mistakes` returns.
    """

    ORDER = (*(key for key in SETTINGS if key != DATA), DATA)  # of values and fields

    def __init__(self, t: Locale, runs: Path, allowed: AllowedPaths = EVERY_PATH) -> None:
        self.t, self.runs, self.allowed = t, runs, allowed
        self.marks: Any = None  # set by `train.build`

    def recipe(self, values: Sequence[Any]) -> Recipe:
        """Return the recipe of the fields' values, which are in the order of `ORDER`.

        Raises:
            RecipeError: all mistakes in the values; `mistakes` shows them at the fields.
            UserError: a path outside the folders that clients may name.
        """
        texts = {key: text_of(key, value) for key, value in zip(self.ORDER, values, strict=True)}
        texts[DATA] = as_list(texts[DATA])
        sets = [f"{key}={text}" for key, text in texts.items()]
        sets.append(f"output_dir={self.runs.absolute()}")
        return self.allowed.require_recipe(recipes.parse_recipe("version: 1\n", "", sets))

    def mistakes(self, error: UserError | None, focus: bool = False) -> list[Any]:
        """Return the update of `marks`: each wrong field with its message; None: no mistake.

        The error is one that `is_at_field`.

        The browser marks the fields and counts them in the summary. With `focus` it also unfolds
        their groups and moves the focus to the first: after Start, not while somebody types.
        """
        texts = {}
        if isinstance(error, RecipeError):
            texts = {item.key.partition("[")[0]: self._in_words(item) for item in error.problems}
        elif error:
            texts[error.where.format()] = f"{self.t(error.what)} {self.t(error.fix)}".strip()
        # The time: a box with the same value as before has no event.
        return [json.dumps({"mistakes": texts, "focus": focus, "at": time.time()})]

    def _in_words(self, problem: Problem) -> str:
        """Return a mistake's text in the form's words: without the key, or null for empty."""
        text = self.t(problem.reason or problem.message).replace("`", "")
        return re.sub(r"\bnull\b", self.t(_("empty")), text)

    def load(self, path: str) -> list[Any]:
        """Return an error's HTML, and what `static/train_form.js` takes for an uploaded recipe."""
        try:
            return ["", loaded(Path(path).stem, recipes.load_recipe(path))]
        except UserError as error:
            return [error_html(error, self.t), ""]

    def open_address(self, request: gr.Request) -> list[Any]:
        """Return the notice and `loaded`: `?copy=RUN` loads that run's settings into the form."""
        name = request.query_params.get("copy")
        if not name:
            return ["", ""]
        try:
            run = store.run_by_name(name, self.runs)
            return ["", loaded(run.title(), run.recipe())]
        except UserError as error:
            return [error_html(error, self.t), ""]


def is_at_field(error: UserError) -> bool:
    """Return whether the error is of values in fields, which `Form.mistakes` can mark."""
    return isinstance(error, RecipeError) or error.where.format() in SETTINGS


def element_id(key: str) -> str:
    """Return the id of a key's field in the page."""
    return f"field-{key.replace('.', '-')}"


def loaded(title: str, recipe: Recipe) -> str:
    """Return a recipe for the browser, which puts it into the fields."""
    return json.dumps({"title": title, "values": form_values(recipe), "at": time.time()})


def command_of(recipe: Recipe, name: str) -> str:
    """Return the command that trains this recipe, based on a shipped one of this name."""
    name = name if name in recipes.shipped() else FIRST
    sets: list[str] = []
    # Twice, as some defaults follow from what the first round sets (alpha from the rank).
    for _round in range(2):
        changes = recipe.diff(recipes.load_recipe(name, sets))
        sets += [f"{key}={text_of(key, value)}" for key, (value, _default) in changes.items()]
    for text in [*sets]:  # what follows from the others needs no mention
        others = [other for other in sets if other != text]
        if recipes.load_recipe(name, others) == recipe:
            sets = others
    if Path(recipe.output_dir) == Path("runs").absolute():
        sets.remove(f"output_dir={recipe.output_dir}")  # the command's default
    options = [f"--set {quoted(text)}" for text in sets]
    return " \\\n  ".join([f"jetson-ft train {quoted(name)}", *options])


def form_values(recipe: Recipe) -> dict[str, Any]:
    """Return the values of the form's fields by key; an empty one stands for null."""
    values = {}
    for key, field in SETTINGS.items():
        value = attrgetter(key)(recipe)
        if is_number(field.annotation) or isinstance(value, bool):
            values[key] = value
        else:
            values[key] = "" if value is None else text_of(key, value)
    if recipe.lora.alpha == 2 * recipe.lora.rank:
        values["lora.alpha"] = None  # so that it follows the rank
    return values


def is_number(annotation: Any) -> bool:
    """Return whether a field's values are numbers, or numbers and null."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation in (int, float):
        return True
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return bool(members) and all(m is NoneType or is_number(m) for m in members)


def text_of(key: str, value: Any) -> str:
    """Return a field's value as an override has it: `lora.rank=…`."""
    if isinstance(value, str):
        return "null" if value == "" and NoneType in get_args(SETTINGS[key].annotation) else value
    if isinstance(value, list):
        plain = [item if isinstance(item, str) else item.model_dump() for item in value]
        return strict_yaml.dump_flow(plain)
    return strict_yaml.dump_yaml({"x": value}).partition(":")[2].strip()


def as_list(text: str) -> str:
    """Return names that are separated by commas or line breaks as a YAML list, other text as is."""
    names = [name.strip() for name in re.split("[,，\n]", text) if name.strip()]
    if len(names) < 2 or text.lstrip().startswith("["):
        return text
    path = os.path.expanduser(text)  # noqa: PTH111 - no error for an unknown user
    if os.path.lexists(path):  # no error for what can't be a path, such as a long list
        return text
    return strict_yaml.dump_flow(names)
