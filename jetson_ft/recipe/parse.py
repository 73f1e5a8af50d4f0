"""Read a recipe: a path or the name of a shipped one, with `key=value` overrides.

All mistakes are reported at once, each with its line and the nearest known key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jetson_ft.errors import Message, Problem, RecipeError, UserError, _
from jetson_ft.files import disk_errors, refuse_special
from jetson_ft.recipe import strict_yaml
from jetson_ft.recipe.data_schema import SourceRecipe
from jetson_ft.recipe.schema import Recipe, fields, type_name


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by path or by the name of a shipped one and apply `key=value` overrides.

    Raises:
        UserError: the file was not found.
        RecipeError: all mistakes in it, with lines and nearest keys.
    """
    path = Path(source)
    refuse_special(path)
    with disk_errors(path):
        if not path.is_file():
            recipes, name = shipped(), str(path).removesuffix(".yaml")
            if name not in recipes:
                fix = _("Give a path, or one of: {names}.")
                raise UserError(_("Recipe not found."), str(source), fix, names=", ".join(recipes))
            path = recipes[name]
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError([Problem("", line, Message(_("not UTF-8 text")))], str(path)) from None
    return parse_recipe(text, str(path), overrides)


def shipped() -> dict[str, Path]:
    """Return the shipped recipes by name: from the package, or in a clone from beside it."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def summary(path: Path) -> str:
    """Return a recipe's first line, a comment: its title, a colon, and what it does."""
    with disk_errors(path), open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def parse_recipe(text: str, where: str = "", overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe of a YAML text; `where` is the file's name for error messages.

    Raises:
        RecipeError: all mistakes in the text and in the overrides.
    """
    value, lines, problems = strict_yaml.parse_yaml(text)
    if not isinstance(value, dict):
        not_mapping = Problem("", 1, Message(_("not a mapping of keys to values")))
        raise RecipeError(problems or [not_mapping], where)
    for override in overrides:
        if problem := _apply(value, lines, override):
            problems.append(problem)
    more = 0
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        mistakes = _one_per_key(error, value)
        problems.extend(_as_problem(details, lines) for details in mistakes[:_MAX_PROBLEMS])
        more = len(mistakes[_MAX_PROBLEMS:])
    if problems:
        problems.sort(key=lambda item: item.line)
        more += len(problems[_MAX_PROBLEMS:])
        raise RecipeError(problems[:_MAX_PROBLEMS], where, more)
    return recipe


def _apply(
    values: dict[str, Any], lines: dict[strict_yaml.KeyPath, int], override: str
) -> Problem | None:
    """Set one `key=value` in the raw mapping; the schema validates it afterwards."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        message = Message(_("--set {override!r}: write it as key=value"), {"override": override})
    elif key in _SECTIONS:
        template = _("--set: `{key}` is a group of keys; set one of them, as {key}.KEY")
        message = Message(template, {"key": key})
    elif key not in _FIELDS:
        message = Message(_OVERRIDE, {"problem": _unknown_key(key)})
    else:
        *sections, name = key.split(".")
        place: Any = values
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):  # else the schema reports that the section is not a mapping
            place[name] = strict_yaml.parse_scalar(text)
            path = tuple(key.split("."))
            for inner in [other for other in lines if other[: len(path)] == path]:
                del lines[inner]
            lines[path] = 0  # the value is not in the file
        return None
    return Problem(key, 0, message)


_MAX_PROBLEMS = 50  # that are shown; a file of anything else has one in every line
_FIELDS = fields()
_SECTIONS = list(dict.fromkeys(key.rpartition(".")[0] for key in _FIELDS if "." in key))
_OVERRIDE = _("--set: {problem}")
_TYPE_ERRORS = {
    "int_type", "string_type", "list_type", "float_type", "bool_type", "literal_error",
    "int_from_float", "dict_type", "model_type",
}  # fmt: skip
# By pydantic's type of error, with its names of the bounds.
_REASONS = {
    "greater_than_equal": _("must be at least {ge:.16g}, not {given}"),
    "less_than_equal": _("must be at most {le:.16g}, not {given}"),
    "greater_than": _("must be greater than {gt:.16g}, not {given}"),
    "less_than": _("must be less than {lt:.16g}, not {given}"),
    "finite_number": _("must be a finite number, not {given}"),
    "string_too_short": _("must not be empty, not {given}"),
    "too_short": _("must not be empty, not {given}"),
    "string_pattern_mismatch": _("must be one line, without control characters, not {given}"),
    "string_unicode": _("must be text that can be written as UTF-8, not {given}"),
}

_OWN_REASONS = {
    "missing": _("is missing"),
    "two_limits": _("`share` and `rows` are both set; set one of them"),
}


def _one_per_key(error: ValidationError, recipe: Any) -> list[Any]:
    """Return one of pydantic's errors for each key or list item, with its path in the recipe.

    A union has an error for each of its members; the one about a value is more useful than the
    one about a type, and the one about a part more than the one about the whole.
    """
    chosen: dict[tuple[Any, ...], Any] = {}
    for details in error.errors():
        path: tuple[Any, ...] = ()
        place = recipe
        for part in details["loc"]:  # in unions, pydantic puts its member's name in between
            is_item = isinstance(place, list) and isinstance(part, int)
            if is_item or (isinstance(place, dict) and part in place):
                path, place = (*path, part), place[part]
        if details["type"] == "missing":
            path = (*path, details["loc"][-1])
        if path not in chosen or chosen[path]["type"] in _TYPE_ERRORS:
            chosen[path] = {**details, "loc": path}
    wholes = {path[:length] for path in chosen for length in range(len(path))}
    return [
        details
        for path, details in chosen.items()
        if details["type"] not in _TYPE_ERRORS or path not in wholes
    ]


def _dotted(path: tuple[Any, ...]) -> str:
    """Return a path as people write it: `data.train[1].share`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def _annotation(path: tuple[Any, ...]) -> Any:
    """Return the type of a key or a list item; None for a group of keys."""
    length = next((n for n, part in enumerate(path) if isinstance(part, int)), len(path))
    field = _FIELDS.get(".".join(path[:length]))
    annotation = field.annotation if field else None
    for part in path[length:]:
        members = [annotation, *get_args(annotation)]
        members += [get_args(member)[0] for member in members if get_origin(member) is Annotated]
        if isinstance(part, int):
            annotation = next(get_args(m)[0] for m in members if get_origin(m) is list)
        else:
            model = next(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
            annotation = model.model_fields[part].annotation
    return annotation


def _as_problem(details: Any, lines: dict[strict_yaml.KeyPath, int]) -> Problem:
    """Return one of pydantic's errors with its line in the file."""
    path = details["loc"]
    key = _dotted(path)
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 0)
    if details["type"] != "extra_forbidden":
        reason = _reason(details)
        message = Message(_("`{key}`: {reason}"), {"key": key, "reason": reason})
        message = message if line else Message(_OVERRIDE, {"problem": message})
        return Problem(key, line, message, reason)
    if isinstance(path[-2] if len(path) > 1 else "", int):  # of a list item
        names = SourceRecipe.model_fields
        near = difflib.get_close_matches(path[-1], names, 1)
        template = _("unknown key `{key}`; did you mean `{near}`?")
        if not near:
            template = _("unknown key `{key}`; the keys are {keys}")
        values = {"key": key, "near": near and near[0], "keys": ", ".join(names)}
        return Problem(key, line, Message(template, values))
    section, dot, name = path[-1].rpartition(".")
    if not dot or path[-1] not in _FIELDS:
        return Problem(key, line, _unknown_key(key))
    template = _("unknown key `{key}`; write `{section}:` and, indented below it, `{name}: …`")
    return Problem(key, line, Message(template, {"key": key, "section": section, "name": name}))


def _reason(details: Any) -> Message:
    """Return what is wrong with a value."""
    value, kind = details["input"], details["type"]
    given = json.dumps(value, ensure_ascii=False, default=str)
    given = given if len(given) <= 60 else given[:57] + "…"
    if kind in _REASONS:
        return Message(_REASONS[kind], {**details.get("ctx", {}), "given": given})
    if kind in _OWN_REASONS:
        return Message(_OWN_REASONS[kind])
    if kind not in _TYPE_ERRORS:
        return Message(_("can't be {given}: {reason}"), {"given": given, "reason": details["msg"]})
    annotation = _annotation(details["loc"])
    type_ = type_name(annotation) if annotation else Message(_("a group of keys"))
    values, template = {"type": type_, "given": given}, _("must be {type}, not {given}")
    if get_origin(annotation) is Literal and isinstance(value, str):
        choices = map(str, get_args(annotation))
        if near := difflib.get_close_matches(value, choices, 1):
            values["near"] = near[0]
            template = _("must be {type}, not {given}; did you mean `{near}`?")
    return Message(template, values)


def _unknown_key(key: str) -> Message:
    """Return the message with the nearest key, by full names or else by last parts."""
    near = difflib.get_close_matches(key, [*_FIELDS, *_SECTIONS], 1, 0.75)
    if not near:
        last = {name.rsplit(".", 1)[-1]: name for name in _FIELDS}
        near = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.6)
        near = [last[name] for name in near]
    if not near:
        return Message(_("unknown key `{key}`"), {"key": key})
    return Message(_("unknown key `{key}`; did you mean `{near}`?"), {"key": key, "near": near[0]})
