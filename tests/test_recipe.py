"""The recipe: strict, all mistakes at once with lines, and the same after every round trip."""

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
from jetson_ft.errors import RecipeError, UserError
from jetson_ft.recipe import Recipe


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipes.parse(text, "x.yaml", overrides)
    return [str(problem) for problem in caught.value.problems]


def test_an_empty_recipe_takes_the_defaults() -> None:
    found = recipes.parse("")
    assert found == Recipe()
    assert (found.model, found.data.train, found.lora.rank, found.lora.alpha, found.output) == (
        "embedded", "bundled", 16, 32.0, "runs",
    )  # fmt: skip


def test_numbers_and_words_are_what_people_mean() -> None:
    found = recipes.parse(
        "train: {learning_rate: 1e-4, epochs: 2}\nmodel: no\nlora: {targets: [q, v]}"
    )
    assert found.train.learning_rate == 1e-4
    assert (found.train.epochs, type(found.train.epochs)) == (2.0, float)
    assert found.model == "no"
    assert found.lora.targets == ["q", "v"]


def test_alpha_is_twice_the_rank_unless_written() -> None:
    assert recipes.parse("lora: {rank: 8}").lora.alpha == 16
    assert recipes.parse("lora: {rank: 8, alpha: 4}").lora.alpha == 4


def test_all_mistakes_are_told_at_once_by_line() -> None:
    text = (
        "model: [a]\n"
        "modle: b\n"
        "lora:\n"
        "  rank: 0\n"
        "  rnak: 4\n"
        "  rank: 8\n"
        "train:\n"
        "  learning_rate: -1e-4\n"
        "  epochs: three\n"
        "quantise: nf4\n"
        "quantize: nf5\n"
    )
    assert mistakes(text) == [
        'line 1: `model`: must be text, not ["a"]',
        "line 2: unknown key `modle`; did you mean `model`?",
        "line 4: `lora.rank`: must be at least 1, not 0",
        "line 5: unknown key `lora.rnak`; did you mean `lora.rank`?",
        "line 6: duplicate key `lora.rank` (first on line 4)",
        "line 8: `train.learning_rate`: must be greater than 0, not -0.0001",
        'line 9: `train.epochs`: must be a number, not "three"',
        "line 10: unknown key `quantise`; did you mean `quantize`?",
        'line 11: `quantize`: must be one of none, int8, nf4, not "nf5"; did you mean `nf4`?',
    ]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("lora: {rank: 0}", "`lora.rank`: must be at least 1, not 0"),
        ("lora: {rank: 8.0}", "`lora.rank`: must be a whole number, not 8.0"),
        ("lora: {rank: true}", "`lora.rank`: must be a whole number, not true"),
        ("lora: {dropout: 1}", "`lora.dropout`: must be less than 1, not 1"),
        ("lora: {alpha: -1}", "`lora.alpha`: must be at least 0, not -1"),
        ("lora: {targets: []}", "`lora.targets`: must not be empty, not []"),
        ("lora: {targets: [1, q]}", "`lora.targets`: must be text or a list of names, not 1"),
        ("train: {learning_rate: 0}", "`train.learning_rate`: must be greater than 0, not 0"),
        ("train: {learning_rate: .nan}", "`train.learning_rate`: must be a finite number, not NaN"),
        ("train: {learning_rate: '1'}", '`train.learning_rate`: must be a number, not "1"'),
        ("train: {max_steps: -1}", "`train.max_steps`: must be at least 0, not -1"),
        ("train: {seed: 4294967296}", "`train.seed`: must be at most 4294967295, not 4294967296"),
        ("data: {heldout: 0}", "`data.heldout`: must be at least 1, not 0"),
        ("data: {heldout: 1.5}", "`data.heldout`: must be a whole number or text, not 1.5"),
        ("data: {heldout: ''}", '`data.heldout`: must not be empty, not ""'),
        ("data: {train: ''}", '`data.train`: must not be empty, not ""'),
        ("data: {max_length: 15}", "`data.max_length`: must be at least 16, not 15"),
        ("double_quantize: yes", '`double_quantize`: must be true or false, not "yes"'),
        ("model: ''", '`model`: must not be empty, not ""'),
        ('output: "a\\nb"', '`output`: must be one line, without control characters, not "a\\nb"'),
        ("output: 2026", "`output`: must be text, not 2026"),
        ("version: 2", "`version`: must be 1, not 2"),
        ("data:", "`data`: must be a group of keys, not null"),
        ("lora: 16", "`lora`: must be a group of keys, not 16"),
        ("trian: {epochs: 1}", "unknown key `trian`; did you mean `train`?"),
        ("rank: 8", "unknown key `rank`; did you mean `lora.rank`?"),
        ("zzz: 8", "unknown key `zzz`"),
        ("lora.rank: 8", "unknown key `lora.rank`; "
         "write `lora:` and, indented below it, `rank: …`"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_once_in_plain_words(text: str, mistake: str) -> None:
    assert mistakes(text) == [f"line 1: {mistake}"]


def test_a_long_wrong_value_is_cut_in_the_message() -> None:
    (mistake,) = mistakes("train: {epochs: " + "x" * 500 + "}")
    assert len(mistake) < 120


@pytest.mark.parametrize(
    "text", ["- a", "text", "null", "42", "[", "a: !!str b", "a: &x 1", "a: " + "[" * 50, "\0"]
)
def test_what_is_no_mapping_is_one_mistake(text: str) -> None:
    assert len(mistakes(text)) == 1


def test_overrides_win_over_the_file_and_the_last_one_over_the_others() -> None:
    found = recipes.parse(
        "lora: {rank: 4}", "", ["lora.rank=8", "train.learning_rate=1e-3", " lora.rank = 32 "]
    )
    assert (found.lora.rank, found.lora.alpha) == (32, 64)
    assert found.train.learning_rate == 1e-3
    assert recipes.parse("", "", ["data.train=my #1 file.json"]).data.train == "my #1 file.json"
    assert recipes.parse("", "", ["lora.targets=[q, v]"]).lora.targets == ["q", "v"]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("lora.rank", "--set 'lora.rank': write it as key=value"),
        ("=8", "--set '=8': write it as key=value"),
        ("", "--set '': write it as key=value"),
        ("lora.rnak=8", "--set: unknown key `lora.rnak`; did you mean `lora.rank`?"),
        ("rank=8", "--set: unknown key `rank`; did you mean `lora.rank`?"),
        ("lora.rank.x=8", "--set: unknown key `lora.rank.x`; did you mean `lora.rank`?"),
        ("lora=8", "--set: `lora` is a group of keys; set one of them, as lora.KEY"),
        ("lora.rank=", '--set: `lora.rank`: must be a whole number, not ""'),
        ("lora.rank=0", "--set: `lora.rank`: must be at least 1, not 0"),
        ("train.learning_rate=-1", "--set: `train.learning_rate`: must be greater than 0, not -1"),
        ("output=", '--set: `output`: must not be empty, not ""'),
        ("output=\udcff", "--set: `output`: must be text that can be written as UTF-8"),
    ],
)
def test_a_wrong_override_is_told_as_one_and_not_by_a_line_of_the_file(
    override: str, mistake: str
) -> None:
    (found,) = mistakes("lora:\n  rank: 8\n", override)
    assert found.startswith(mistake)


def test_mistakes_of_file_and_overrides_come_together() -> None:
    found = mistakes("modle: x\nlora: 3\n", "lora.rank=0", "nonsense", "train.epochs=0")
    assert len(found) == 4
    assert "line 2: `lora`: must be a group of keys, not 3" in found


# Round trips

_WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"),
    min_size=1,
    max_size=20,
) | st.sampled_from(["1e-4", "08", "no", "~", "null", "0x1", "- a", "a: b", "#", "''", " x ", "="])


def _numbers(low: float, high: float, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **more)


@st.composite
def recipe_values(draw: st.DrawFn) -> dict[str, Any]:
    """Any recipe's values, some keys left out."""
    sections: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "data": {
            "train": _WORDS,
            "heldout": _WORDS | st.integers(1, 10**6),
            "max_length": st.integers(16, 131072),
            "over_length": st.sampled_from(["truncate", "drop"]),
            "encoding": _WORDS,
        },
        "lora": {
            "rank": st.integers(1, 1024),
            "alpha": _numbers(0, 1e6),
            "dropout": _numbers(0, 1, exclude_max=True),
            "targets": _WORDS | st.lists(_WORDS, min_size=1, max_size=3),
            "dora": st.booleans(),
        },
        "train": {
            "epochs": _numbers(0, 1000, exclude_min=True),
            "learning_rate": _numbers(0, 1, exclude_min=True),
            "max_steps": st.integers(min_value=0),
            "tokens_per_step": st.integers(min_value=1),
            "seed": st.integers(0, 2**32 - 1),
            "max_minutes": st.integers(0, 10**6) | _numbers(0, 1e9),
        },
        "eval": {"max_new_tokens": st.integers(1, 8192)},
    }
    values: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "model": _WORDS, "output": _WORDS, "double_quantize": st.booleans(),
                "quantize": st.sampled_from(["none", "int8", "nf4"]), "version": st.just(1),
            },
        )
    )  # fmt: skip
    for name, keys in sections.items():
        values[name] = draw(st.fixed_dictionaries({}, optional=keys))
    return values


@settings(deadline=None)
@given(recipe_values())
def test_any_recipe_survives_being_written_and_read(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    again = recipes.parse(recipe.to_yaml())
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert again.to_yaml() == recipe.to_yaml()


@settings(deadline=None)
@given(recipe_values())
def test_other_yaml_readers_see_the_same_recipe(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    assert yaml.safe_load(recipe.to_yaml()) == recipe.model_dump()


@settings(deadline=None)
@given(st.text(max_size=300))
def test_arbitrary_text_raises_nothing_but_recipe_errors(text: str) -> None:
    try:
        recipes.parse(text)
    except RecipeError as error:
        assert error.problems


_KEYS = [*recipes.keys(), "data", "lora", "train", "eval", "x", "lora.rnak", "0"]
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=3) | st.builds(lambda: {"a": 1})  # a new one


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4), st.lists(st.text(), max_size=2)
)
def test_wrong_values_raise_nothing_but_recipe_errors(
    values: dict[str, Any], overrides: list[str]
) -> None:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        place = nested.setdefault(section, {}) if section else nested
        if isinstance(place, dict):
            place[name] = value
    try:
        recipes.parse(
            json.dumps(nested), "x", [*overrides, *(f"{k}={v}" for k, v in values.items())]
        )
    except RecipeError as error:
        assert all(problem.message for problem in error.problems)


def test_the_resolved_recipe_holds_every_key() -> None:
    written = yaml.safe_load(Recipe().to_yaml())
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in written.items()
        for key in (value if isinstance(value, dict) else [""])
    }
    assert flat == set(recipes.keys())


def test_the_hash_ignores_order_comments_and_written_defaults() -> None:
    one = recipes.parse("model: a\nlora:\n  rank: 8\n  dora: true\n")
    two = recipes.parse(
        "# a comment\nlora: {dora: true, alpha: 16, rank: 8}  # more\nmodel: 'a'\ntrain: {seed: 0}"
    )
    assert one.sha256() == two.sha256()
    assert re.fullmatch("[0-9a-f]{64}", one.sha256())


def test_the_hash_knows_every_value() -> None:
    base = Recipe().sha256()
    others = ("seed: 1", "epochs: 4", "max_steps: 1", "learning_rate: 1e-4")
    hashes = {recipes.parse(f"train: {{{text}}}").sha256() for text in others}
    assert len(hashes | {base}) == 5


def test_differences_are_named_by_key() -> None:
    one, two = recipes.parse("lora: {rank: 8}"), recipes.parse("model: x")
    assert one.diff(two) == {
        "model": ("embedded", "x"), "lora.rank": (8, 16), "lora.alpha": (16.0, 32.0),
    }  # fmt: skip
    assert one.diff(one) == {}


# The schema for editors


def _accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """JSON schema, as much of it as recipes use; an unknown word of it is an error."""
    types = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
        "number": (int, float),
    }  # fmt: skip
    checks = {
        "$ref": lambda rule: _accepts(root["$defs"][rule.rsplit("/", 1)[1]], value, root),
        "anyOf": lambda rules: any(_accepts(rule, value, root) for rule in rules),
        "type": lambda name: isinstance(value, types[name])
        and (name == "boolean" or not isinstance(value, bool)),
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
def test_the_schema_takes_every_recipe(values: dict[str, Any]) -> None:
    assert _accepts(SCHEMA, values, SCHEMA)
    assert _accepts(SCHEMA, Recipe.model_validate(values).model_dump(), SCHEMA)


_TRIALS = (
    None, -1, 0, 1, 0.5, 20, 5000, 1e9, "", "x", "auto", "none", "cosine", "a\nb", [], ["a"], [1],
    [""], {},
)  # fmt: skip


@pytest.mark.parametrize("key", recipes.keys())
def test_schema_and_reader_agree_on_every_key(key: str) -> None:
    section, _, name = key.rpartition(".")
    for value in _TRIALS:
        values = {section: {name: value}} if section else {name: value}
        try:
            recipes.parse(json.dumps(values))
            read = True
        except RecipeError:
            read = False
        assert _accepts(SCHEMA, values, SCHEMA) == read, value


def test_schema_and_reader_refuse_unknown_keys() -> None:
    assert not _accepts(SCHEMA, {"x": 1}, SCHEMA)
    assert not _accepts(SCHEMA, {"lora": {"x": 1}}, SCHEMA)


def test_every_key_explains_itself() -> None:
    assert all(len(text) > 15 and text.endswith(".") for text in recipes.keys().values())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("quantize", "one of none, int8, nf4"), ("data.heldout", "a whole number or text"),
        ("lora.targets", "text or a list of names"), ("train.epochs", "a number"),
        ("lora.dora", "true or false"), ("version", "1"), ("model", "text"),
    ],
)  # fmt: skip
def test_types_are_said_in_plain_words(key: str, words: str) -> None:
    assert recipes.type_name(dict(recipes.fields())[key].annotation) == words


# Files

SHIPPED = {
    "quickstart-zh", "phi-1_5-zh", "phi-1_5-zh-quick", "phi-1_5-zh-qlora", "phi-1_5-zh-int8",
    "phi-1_5-zh-seeed", "embedded-zh-1h",
}  # fmt: skip


def test_the_promised_recipes_are_shipped() -> None:
    assert set(recipes.shipped()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_recipe_is_found_by_its_name(name: str) -> None:
    found = recipes.load(name)
    assert found == recipes.load(recipes.shipped()[name]) == recipes.load(f"{name}.yaml")


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_recipe_explains_itself_and_every_key_it_sets(name: str) -> None:
    first, *lines = recipes.shipped()[name].read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    explained, keys = False, 0
    for line in lines:
        if line.lstrip().startswith("#"):
            explained = True
        elif not line or line.endswith(":"):
            explained = False
        else:
            keys += 1
            assert explained, line  # one comment may stand above a few keys
    assert keys >= 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart-zh", ("embedded", "bundled", "none")),
        ("phi-1_5-zh", ("microsoft/phi-1_5", "llamafactory/alpaca_zh", "none")),
        ("phi-1_5-zh-qlora", ("microsoft/phi-1_5", "llamafactory/alpaca_zh", "nf4")),
        ("phi-1_5-zh-int8", ("microsoft/phi-1_5", "llamafactory/alpaca_zh", "int8")),
    ],
)
def test_shipped_recipes_do_what_their_name_says(name: str, expected: tuple[str, str, str]) -> None:
    found = recipes.load(name)
    assert (found.model, found.data.train, found.quantize) == expected


def test_a_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart-zh").write_text("model: mine", encoding="utf-8")
    assert recipes.load("quickstart-zh").model == "mine"


def test_a_folder_of_a_shipped_name_is_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart-zh").mkdir()
    assert recipes.load("quickstart-zh").model == "embedded"


@pytest.mark.parametrize(
    "name", ["", ".", "gone.yaml", "gone/quickstart-zh", "/etc", "quickstart", "quickstart-zh.txt"]
)
def test_a_missing_recipe_is_told_with_the_shipped_names(name: str) -> None:
    with pytest.raises(UserError, match="no such recipe") as caught:
        recipes.load(name)
    assert "quickstart-zh" in caught.value.fix


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_an_impossible_path_is_refused_plainly(name: str) -> None:
    with pytest.raises(UserError):
        recipes.load(name)


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: \xe5\x90\x8d")
    assert recipes.load(path).model == "名"


def test_a_byte_that_is_no_text_is_told_with_its_line_and_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("# 注\nmodel: ".encode() + "中文".encode("gb18030"))
    with pytest.raises(RecipeError, match="line 2: not UTF-8 text") as caught:
        recipes.load(path)
    assert caught.value.where == str(path)


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("x: 1", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, ["lora.rank=0"])
    assert caught.value.where == str(path)
    assert len(caught.value.problems) == 2
