"""The recipe: one strict schema, declared here and nowhere else.

The command line's help, the documentation (docs/recipe.md), the JSON schema for editors
and the web form derive from these classes. A recipe is YAML; what is not written takes
the default below; `Recipe.to_yaml` writes every default out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jetson_ft import strict_yaml
from jetson_ft.errors import Problem, RecipeError, UserError
from jetson_ft.paths import disk_errors

VERSION = 1
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# One line: names and paths with control characters in them are never meant.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class DataRecipe(_Section):
    """Which rows are learnt and which are kept back to measure with."""

    train: Text = Field(
        "bundled",
        description="Rows to learn: `bundled` (the Chinese set that comes along), a file "
        "(.json, .jsonl, .csv, .parquet) or a hub data set id such as `owner/name`.",
    )
    heldout: Annotated[int, Field(ge=1)] | Text = Field(
        "auto",
        description="Rows never trained on: a file, a number of rows taken from the end of "
        "`train`, or `auto` (the bundled held-out set for bundled data, else the last "
        "min(60, 10 %) rows).",
    )
    max_length: int = Field(
        1024, ge=16, le=131072, description="Longest row in tokens; the rest is cut or dropped."
    )
    over_length: Literal["truncate", "drop"] = Field(
        "truncate", description="What happens to a row longer than `max_length`."
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="A broken or incomplete row ends the run, or is skipped and counted."
    )
    format: Literal["auto", "alpaca", "sharegpt", "messages"] = Field(
        "auto", description="How a row names its parts; `auto` detects it and says what it found."
    )
    encoding: Text = Field(
        "auto", description="Text encoding of the file (`utf-8`, `gb18030`, …); `auto` detects it."
    )


class LoraRecipe(_Section):
    """The adapter: low-rank matrices beside the frozen linear layers."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the two adapter matrices.")
    alpha: float = Field(
        0.0,
        ge=0,
        description="Scale numerator: the update counts alpha / rank. Not written: 2 x rank.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout before the adapter; costs memory, seldom helps."
    )
    targets: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        "all-linear",
        description="Layers that get an adapter: `all-linear`, or a list of module names.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA).")
    dora: bool = Field(False, description="Learn magnitude and direction apart (DoRA); slower.")

    @model_validator(mode="after")
    def _alpha_follows_rank(self) -> LoraRecipe:
        if self.alpha == 0:
            self.alpha = 2.0 * self.rank
        return self


class TrainRecipe(_Section):
    """How long and how fast to learn. The first of epochs, max_steps, max_minutes ends the run."""

    epochs: float = Field(3.0, gt=0, le=1000, description="Passes over the training rows.")
    max_steps: int = Field(0, ge=0, description="Optimizer steps at most; 0 means no such limit.")
    max_minutes: float = Field(
        0.0,
        ge=0,
        description="Minutes of training at most; 0 means no such limit. The number of steps is "
        "fixed after the first few are timed.",
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the rate falls after the warm-up."
    )
    warmup_steps: int = Field(5, ge=0, description="Steps over which the rate rises from zero.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    tokens_per_step: int = Field(
        4096,
        ge=1,
        description="Tokens (without padding) that form one optimizer step, whole rows.",
    )
    max_memory_gb: float = Field(
        0.0,
        ge=0,
        description="Memory the run is planned for, in GB (10^9 bytes); 0: what is free at its "
        "start. Less leaves room for other programs; changes speed, never the result.",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of row order and adapter.")
    eval_every: int = Field(
        0,
        ge=0,
        description="Steps between held-out measurements; 0 chooses, so that they take about "
        "a tenth of the time.",
    )
    early_stopping: int = Field(
        3,
        ge=0,
        description="Held-out measurements without improvement after which the run ends; 0: never.",
    )
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="Minutes between checkpoints, besides those at measurements."
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Newest checkpoints kept; the best one is always kept."
    )
    on_oom: Literal["stop", "shrink"] = Field(
        "stop",
        description="When training runs out of memory: `stop`, or `shrink`: start again from the "
        "last checkpoint, once, by the next smaller plan. Changes speed, never the result.",
    )


class EvalRecipe(_Section):
    """The before/after comparison on the held-out rows."""

    max_new_tokens: int = Field(
        160, ge=1, le=8192, description="Longest reply written for the comparison, in tokens."
    )
    samples: int = Field(8, ge=0, description="Pairs of replies shown side by side.")


class DeviceRecipe(_Section):
    """What the machine is spared."""

    max_temperature_c: float = Field(
        0.0,
        ge=0,
        le=150,
        description="Training pauses between steps where the board is hotter than this (degrees "
        "Celsius), until it has cooled by 5; 0: it never does.",
    )


class Recipe(_Section):
    """One fine-tuning job."""

    version: Literal[1] = Field(1, description="Version of this format.")
    model: Text = Field(
        "embedded",
        description="`embedded` (SmolLM2-135M-Instruct, works offline), a hub id such as "
        "`microsoft/phi-1_5`, or a folder with safetensors or GGUF weights.",
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="Format of the frozen weights; int8 and nf4 through bitsandbytes."
    )
    double_quantize: bool = Field(
        True, description="With nf4: quantise the scales too (saves 0.4 bits a weight)."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Arithmetic; `auto` takes bf16 where the device is fast at it."
    )
    data: DataRecipe = Field(DataRecipe(), description=DataRecipe.__doc__ or "")
    lora: LoraRecipe = Field(LoraRecipe(), description=LoraRecipe.__doc__ or "")
    train: TrainRecipe = Field(TrainRecipe(), description=TrainRecipe.__doc__ or "")
    eval: EvalRecipe = Field(EvalRecipe(), description=EvalRecipe.__doc__ or "")
    device: DeviceRecipe = Field(DeviceRecipe(), description=DeviceRecipe.__doc__ or "")
    output: Text = Field("runs", description="Folder under which the run's own folder is made.")

    def to_yaml(self) -> str:
        """The resolved recipe: every key with its value."""
        return strict_yaml.dump(self.model_dump())

    def sha256(self) -> str:
        """Hash over the resolved values, independent of comments and order in the file."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def diff(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted keys whose values differ: (mine, theirs)."""
        mine, theirs = dict(_flatten(self.model_dump())), dict(_flatten(other.model_dump()))
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe by path or by the name of a shipped one and applies `key=value` overrides.

    Raises:
        UserError: no such file.
        RecipeError: every mistake in it, with lines and nearest keys.
    """
    path = find(source)
    with disk_errors(path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError([Problem("", line, "not UTF-8 text")], str(path)) from None
    return parse(text, str(path), overrides)


def find(source: str | Path) -> Path:
    """The file a person means: a path, or the name of a shipped recipe."""
    path = Path(source)
    with disk_errors(path):
        if path.is_file():
            return path
    named = shipped_folder() / f"{path.stem}.yaml"
    if path.name in (named.name, named.stem) and len(path.parts) == 1 and named.is_file():
        return named
    names = ", ".join(sorted(shipped()))
    raise UserError("There is no such recipe.", str(source), f"Give a path, or one of: {names}.")


def shipped_folder() -> Path:
    """Where the shipped recipes lie: in the wheel inside the package, in a clone beside it."""
    inside = Path(__file__).with_name("recipes")
    return inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"


def shipped() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def parse(text: str, where: str = "", overrides: Iterable[str] = ()) -> Recipe:
    """Recipe text (YAML) to `Recipe`; raises `RecipeError` with all mistakes at once."""
    value, lines, problems = strict_yaml.load(text)
    if not isinstance(value, dict):
        raise RecipeError(problems or [Problem("", 1, "not a mapping of keys to values")], where)
    for override in overrides:
        problem = _apply(value, lines, override)
        problems.extend([problem] if problem else [])
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        problems.extend(_explain(found, lines) for found in _one_a_key(error))
    if problems:
        raise RecipeError(sorted(problems, key=lambda item: item.line), where)
    return recipe


def json_schema() -> str:
    """The schema as JSON, for editors and other programs."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def keys() -> dict[str, str]:
    """Every dotted key with its one-line help, in the order of the schema."""
    return {name: field.description or "" for name, field in fields()}


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of every setting, sections opened."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply(
    values: dict[str, Any], lines: dict[strict_yaml.KeyPath, int], override: str
) -> Problem | None:
    """Sets one `key=value` in the raw mapping; the schema judges it afterwards."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return Problem(key, 0, f"--set {override!r}: write it as key=value")
    if key in _SECTIONS:
        return Problem(key, 0, f"--set: `{key}` is a group of keys; set one of them, as {key}.KEY")
    if key not in keys():
        return Problem(key, 0, f"--set: unknown key `{key}`{_nearest(key)}")
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            return None  # the schema's own message about this section says more
        values = inner
    values[name] = strict_yaml.scalar(text)
    lines[tuple(key.split("."))] = _NOT_IN_THE_FILE
    return None


_SECTIONS = [name for name, field in Recipe.model_fields.items() if name not in dict(fields())]
_NOT_IN_THE_FILE = 0
_TYPE_ERRORS = {
    "int_type", "string_type", "list_type", "float_type", "bool_type", "literal_error",
    "int_from_float", "dict_type", "model_type",
}  # fmt: skip
# By pydantic's type of error, with the names it gives to the bounds.
_REASONS = {
    "greater_than_equal": "must be at least {ge:.16g}, not {given}",
    "less_than_equal": "must be at most {le:.16g}, not {given}",
    "greater_than": "must be greater than {gt:.16g}, not {given}",
    "less_than": "must be less than {lt:.16g}, not {given}",
    "finite_number": "must be a finite number, not {given}",
    "string_too_short": "must not be empty, not {given}",
    "too_short": "must not be empty, not {given}",
    "string_pattern_mismatch": "must be one line, without control characters, not {given}",
    "string_unicode": "must be text that can be written as UTF-8, not {given}",
}


def _one_a_key(error: ValidationError) -> list[Any]:
    """A union complains once for each of its members; the complaint about a value says most."""
    chosen: dict[tuple[Any, ...], Any] = {}
    for found in error.errors():
        path = _written(found)
        if path not in chosen or chosen[path]["type"] in _TYPE_ERRORS:
            chosen[path] = {**found, "loc": path}
    return list(chosen.values())


def _written(found: Any) -> tuple[Any, ...]:
    """The key as a person wrote it; in unions, pydantic adds its member's name."""
    path = tuple(found["loc"])
    known = {*keys(), *_SECTIONS}
    while path and found["type"] != "extra_forbidden" and ".".join(map(str, path)) not in known:
        path = path[:-1]
    return path


def _explain(found: Any, lines: dict[strict_yaml.KeyPath, int]) -> Problem:
    """One pydantic error as a sentence with the line it stands on."""
    path = found["loc"]
    dotted = ".".join(map(str, path))
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 0)
    if found["type"] == "extra_forbidden":
        return Problem(dotted, line, f"unknown key `{dotted}`{_hint(path)}")
    place = "" if line else "--set: "
    return Problem(dotted, line, f"{place}`{dotted}`: {_reason(dotted, found)}")


def _hint(path: tuple[Any, ...]) -> str:
    """What was meant by an unknown key."""
    if path[-1] in keys():
        section, name = path[-1].split(".")
        return f"; write `{section}:` and, indented below it, `{name}: …`"
    return _nearest(".".join(map(str, path)))


def _reason(dotted: str, found: Any) -> str:
    field = dict(fields()).get(dotted)
    given = json.dumps(found["input"], ensure_ascii=False, default=str)
    given = given if len(given) <= 60 else given[:57] + "…"
    if found["type"] in _TYPE_ERRORS:
        wanted = type_name(field.annotation) if field else "a group of keys"
        if near := _nearest_choice(found["input"], field):
            return f"must be {wanted}, not {given}; did you mean `{near}`?"
        return f"must be {wanted}, not {given}"
    if found["type"] in _REASONS:
        return _REASONS[found["type"]].format(given=given, **found.get("ctx", {}))
    return f"can't be {given}: {found['msg']}"


def type_name(annotation: Any) -> str:
    """A field's type in plain words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is Literal:
        choices = list(map(str, get_args(annotation)))
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return "a list of names"
    return " or ".join(map(type_name, get_args(annotation)))


def _nearest_choice(value: Any, field: Any) -> str:
    """For one of several words: the one that was meant; else nothing."""
    is_word = field and get_origin(field.annotation) is Literal and isinstance(value, str)
    near = (
        difflib.get_close_matches(value, map(str, get_args(field.annotation)), 1) if is_word else []
    )
    return near[0] if near else ""


def _nearest(key: str) -> str:
    """` ; did you mean …` for a mistyped key, looking at full names and at last parts."""
    near = difflib.get_close_matches(key, [*keys(), *_SECTIONS], 1, 0.75)
    if not near:
        last = {name.rsplit(".", 1)[-1]: name for name in keys()}
        close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.6)
        near = [last[close[0]]] if close else []
    return f"; did you mean `{near[0]}`?" if near else ""
