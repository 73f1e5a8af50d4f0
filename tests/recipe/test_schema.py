"""The schema: the same recipe after every round trip, and the JSON schema for editors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft import recipe as recipes
from jetson_ft.errors import RecipeError
from jetson_ft.recipe import Recipe

_WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"),
    min_size=1,
    max_size=20,
) | st.sampled_from(["1e-4", "08", "no", "~", "null", "0x1", "- a", "a: b", "#", "''", " x ", "="])


def _numbers(low: float, high: float, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **more)


_SOURCES = st.fixed_dictionaries({"source": _WORDS}) | st.fixed_dictionaries(
    {"source": _WORDS, "share": _numbers(0, 1, exclude_min=True)}
)


@st.composite
def recipe_values(draw: st.DrawFn) -> dict[str, Any]:
    """Any recipe's values, some keys left out."""
    sections: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "data": {
            "train": _WORDS | st.lists(_WORDS | _SOURCES, min_size=1, max_size=3),
            "heldout": _WORDS | st.integers(1, 10**6),
            "max_length": st.integers(16, 131072),
            "truncation": st.sampled_from(["truncate", "drop"]),
            "encoding": _WORDS,
            "columns": st.fixed_dictionaries({}, optional={"question": _WORDS, "answer": _WORDS}),
        },
        "lora": {
            "rank": st.integers(1, 1024),
            "alpha": st.none() | _numbers(1e-6, 1e6),
            "dropout": _numbers(0, 1, exclude_max=True),
            "target_modules": _WORDS | st.lists(_WORDS, min_size=1, max_size=3),
            "dora": st.booleans(),
        },
        "train": {
            "epochs": _numbers(0, 1000, exclude_min=True),
            "learning_rate": _numbers(0, 1, exclude_min=True),
            "max_steps": st.none() | st.integers(min_value=1),
            "tokens_per_step": st.integers(min_value=1),
            "seed": st.integers(0, 2**32 - 1),
            "max_minutes": st.none() | st.integers(1, 10**6) | _numbers(1e-3, 1e9),
        },
        "eval": {"max_new_tokens": st.integers(1, 8192)},
    }
    values: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "model": _WORDS, "output_dir": _WORDS, "double_quantize": st.booleans(),
                "quantize": st.sampled_from(["none", "int8", "nf4"]), "version": st.just(1),
            },
        )
    )  # fmt: skip
    for name, keys in sections.items():
        values[name] = draw(st.fixed_dictionaries({}, optional=keys))
    return values


@settings(deadline=None)
@given(recipe_values())
def test_written_recipe_is_read_back(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    again = recipes.parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert again.to_yaml() == recipe.to_yaml()


@settings(deadline=None)
@given(recipe_values())
def test_written_recipe_is_the_same_for_other_yaml_readers(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    assert yaml.safe_load(recipe.to_yaml()) == recipe.model_dump()


def test_resolved_recipe_has_every_key() -> None:
    written = yaml.safe_load(Recipe().to_yaml())

    def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
        flat = set()
        for name, value in values.items():
            key = prefix + name
            flat |= keys(value, f"{key}.") if isinstance(value, dict) else {key}
        return flat

    assert keys(written) == set(recipes.fields())


def test_hash_ignores_order_comments_and_written_defaults() -> None:
    one = recipes.parse_recipe("model: a\nlora:\n  rank: 8\n  dora: true\n")
    two = recipes.parse_recipe(
        "# a comment\nlora: {dora: true, alpha: 16, rank: 8}  # more\nmodel: 'a'\ntrain: {seed: 0}"
    )
    assert one.sha256() == two.sha256()
    assert re.fullmatch("[0-9a-f]{64}", one.sha256())


def test_hash_changes_with_every_value() -> None:
    base = Recipe().sha256()
    others = ("seed: 1", "epochs: 4", "max_steps: 1", "learning_rate: 1e-4")
    hashes = {recipes.parse_recipe(f"train: {{{text}}}").sha256() for text in others}
    assert len(hashes | {base}) == 5


def test_diff_is_by_key() -> None:
    one, two = recipes.parse_recipe("lora: {rank: 8}"), recipes.parse_recipe("model: x")
    assert one.diff(two) == {
        "model": ("embedded", "x"), "lora.rank": (8, 16), "lora.alpha": (16.0, 32.0),
    }  # fmt: skip
    assert one.diff(one) == {}


def _accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """JSON schema, as much of it as recipes use; an unknown keyword is an error."""
    types = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
        "number": (int, float), "null": type(None),
    }  # fmt: skip
    checks = {
        "$ref": lambda rule: _accepts(root["$defs"][rule.rsplit("/", 1)[1]], value, root),
        "anyOf": lambda rules: any(_accepts(rule, value, root) for rule in rules),
        "type": lambda name: isinstance(value, types[name])
        and (name == "boolean" or not isinstance(value, bool)),
        "required": lambda keys: set(keys) <= set(value),
        "enum": lambda choices: value in choices,
        "const": lambda choice: value == choice,
        "minimum": lambda low: value >= low,
        "maximum": lambda high: value <= high,
        "exclusiveMinimum": lambda low: value > low,
        "exclusiveMaximum": lambda high: value < high,
        "minLength": lambda low: len(value) >= low,
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "minItems": lambda low: len(value) >= low,
        "items": lambda rule: all(_accepts(rule, item, root) for item in value),
        "additionalProperties": lambda allowed: allowed or not set(value) - {*schema["properties"]},
        "properties": lambda rules: all(_accepts(rules[key], value[key], root) for key in value),
    }  # fmt: skip
    order = list(checks)  # types first, so that the others may rely on them
    words = sorted(
        set(schema) - {"title", "description", "default", "$defs"},
        key=lambda word: order.index(word),
    )
    return all(checks[word](schema[word]) for word in words)


SCHEMA: dict[str, Any] = json.loads(recipes.json_schema())


@settings(deadline=None)
@given(recipe_values())
def test_json_schema_accepts_every_recipe(values: dict[str, Any]) -> None:
    assert _accepts(SCHEMA, values, SCHEMA)
    assert _accepts(SCHEMA, Recipe.model_validate(values).model_dump(), SCHEMA)


_TRIALS = (
    None, -1, 0, 1, 0.5, 20, 5000, 1e9, "", "x", "auto", "none", "cosine", "a\nb", [], ["a"], [1],
    [""], {}, ["a", {"source": "b"}], [{"source": "b", "share": 1}], [{"source": "b", "share": 2}],
    [{"source": "b", "rows": 1}], [{"source": "b", "rows": 0.5}], [{"share": 0.5}],
    [{"source": "b", "x": 1}],
)  # fmt: skip


@pytest.mark.parametrize("key", recipes.fields())
def test_json_schema_and_parser_agree_on_every_key(key: str) -> None:
    for value in _TRIALS:
        values: Any = value
        for name in reversed(key.split(".")):
            values = {name: values}
        try:
            recipes.parse_recipe(json.dumps(values))
            read = True
        except RecipeError:
            read = False
        assert _accepts(SCHEMA, values, SCHEMA) == read, value


def test_json_schema_refuses_unknown_keys() -> None:
    assert not _accepts(SCHEMA, {"x": 1}, SCHEMA)
    assert not _accepts(SCHEMA, {"lora": {"x": 1}}, SCHEMA)


def test_every_key_has_a_name_for_people_and_help() -> None:
    for key, field in recipes.fields().items():
        assert field.title and field.title != key and "_" not in field.title
        assert len(field.description) > 15 and field.description.endswith(".")


@pytest.mark.parametrize("path", recipes.shipped().values(), ids=list(recipes.shipped()))
def test_a_shipped_recipe_begins_with_its_title_and_what_it_does(path: Path) -> None:
    title, text = recipes.summary(path).split(": ", maxsplit=1)
    assert 3 < len(title) < 30 and text.endswith(".")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("quantize", "one of none, int8, nf4"), ("data.heldout", "a whole number or text"),
        ("lora.target_modules", "text or a list of names"), ("train.epochs", "a number"),
        ("lora.dora", "true or false"), ("version", "1"), ("model", "text"),
        ("data.columns.answer", "text or null"),
        ("data.train", "text or a list, each item text or a mapping of source, share, rows"),
    ],
)  # fmt: skip
def test_type_name_is_in_plain_words(key: str, words: str) -> None:
    assert str(recipes.type_name(recipes.fields()[key].annotation)) == words


@pytest.mark.parametrize("text", ["q_proj,v_proj", " q_proj , v_proj,"])
def test_target_modules_with_commas_are_a_list(text: str) -> None:
    recipe = Recipe.model_validate({"lora": {"target_modules": text}})
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert Recipe.model_validate({"lora": {"target_modules": "fc1"}}).lora.target_modules == "fc1"


def test_target_modules_of_commas_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        Recipe.model_validate({"lora": {"target_modules": ","}})
