"""Recipes are read strictly: all mistakes at once, each with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_ft import recipe as recipes
from jetson_ft.errors import RecipeError, UserError
from jetson_ft.recipe import Recipe, SourceRecipe


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipes.parse_recipe(text, "x.yaml", overrides)
    return [str(problem.as_message()) for problem in caught.value.problems]


def test_empty_recipe_has_the_defaults() -> None:
    recipe = recipes.parse_recipe("")
    assert recipe == Recipe()
    assert (recipe.model, recipe.data.train, recipe.output_dir) == ("embedded", "bundled", "runs")
    assert (recipe.lora.rank, recipe.lora.alpha) == (16, 32.0)


def test_numbers_and_words_have_their_types() -> None:
    recipe = recipes.parse_recipe(
        "train: {learning_rate: 1e-4, epochs: 2}\nmodel: no\nlora: {target_modules: [q, v]}"
    )
    assert recipe.train.learning_rate == 1e-4
    assert (recipe.train.epochs, type(recipe.train.epochs)) == (2.0, float)
    assert recipe.model == "no"
    assert recipe.lora.target_modules == ["q", "v"]


def test_columns_are_set_in_the_file_and_by_overrides() -> None:
    recipe = recipes.parse_recipe(
        "data: {columns: {question: title}}", overrides=["data.columns.answer=body text"]
    )
    assert recipe.data.columns.chosen() == {"question": "title", "answer": "body text"}
    assert recipes.parse_recipe(recipe.to_yaml()) == recipe
    assert Recipe().data.columns.chosen() == {}


def test_mistakes_in_columns_are_reported_by_line() -> None:
    text = "data:\n  columns:\n    qestion: a\n    answer: 3\n"
    assert mistakes(text) == [
        "line 3: unknown key `data.columns.qestion`; did you mean `data.columns.question`?",
        "line 4: `data.columns.answer`: must be text or null, not 3",
    ]
    assert mistakes("data: {columns: title}") == [
        'line 1: `data.columns`: must be a group of keys, not "title"'
    ]
    assert mistakes("", "data.columns=title") == [
        "--set: `data.columns` is a group of keys; set one of them, as data.columns.KEY"
    ]
    assert mistakes("data: [1]", "data.columns.answer=a") == [
        "line 1: `data`: must be a group of keys, not [1]"
    ]


def test_alpha_is_twice_the_rank_unless_set() -> None:
    assert recipes.parse_recipe("lora: {rank: 8}").lora.alpha == 16
    assert recipes.parse_recipe("lora: {rank: 8, alpha: 4}").lora.alpha == 4


def test_all_mistakes_are_reported_at_once_by_line() -> None:
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
        ("lora: {alpha: -1}", "`lora.alpha`: must be greater than 0, not -1"),
        ("lora: {target_modules: []}", "`lora.target_modules`: must not be empty, not []"),
        ("lora: {target_modules: [1, q]}",
         "`lora.target_modules[0]`: must be text, not 1"),
        ("train: {learning_rate: 0}", "`train.learning_rate`: must be greater than 0, not 0"),
        ("train: {learning_rate: .nan}", "`train.learning_rate`: must be a finite number, not NaN"),
        ("train: {learning_rate: '1'}", '`train.learning_rate`: must be a number, not "1"'),
        ("train: {max_steps: -1}", "`train.max_steps`: must be at least 1, not -1"),
        ("train: {seed: 4294967296}", "`train.seed`: must be at most 4294967295, not 4294967296"),
        ("data: {heldout: 0}", "`data.heldout`: must be at least 1, not 0"),
        ("data: {heldout: 1.5}", "`data.heldout`: must be a whole number or text, not 1.5"),
        ("data: {heldout: ''}", '`data.heldout`: must not be empty, not ""'),
        ("data: {train: ''}", '`data.train`: must not be empty, not ""'),
        ("data: {train: []}", "`data.train`: must not be empty, not []"),
        ("data: {train: 5}", "`data.train`: must be text or a list, each item text or a mapping of "
         "source, share, rows, not 5"),
        ("data: {train: [a, 5]}",
         "`data.train[1]`: must be text or a mapping of source, share, rows, not 5"),
        ("data: {train: ['']}", '`data.train[0]`: must not be empty, not ""'),
        ("data: {train: [a, {source: b, share: 2}]}",
         "`data.train[1].share`: must be at most 1, not 2"),
        ("data: {train: [{source: b, share: 0}]}",
         "`data.train[0].share`: must be greater than 0, not 0"),
        ("data: {train: [{source: b, rows: '5'}]}",
         '`data.train[0].rows`: must be a whole number or null, not "5"'),
        ("data: {train: [{source: b, rows: 5, share: 1}]}",
         "`data.train[0]`: `share` and `rows` are both set; set one of them"),
        ("data: {train: [{share: 0.5}]}", "`data.train[0].source`: is missing"),
        ("data: {train: [{source: b, shrae: 1}]}",
         "unknown key `data.train[0].shrae`; did you mean `share`?"),
        ("data: {train: [{source: b, x: 1}]}",
         "unknown key `data.train[0].x`; the keys are source, share, rows"),
        ("data: {max_length: 15}", "`data.max_length`: must be at least 16, not 15"),
        ("double_quantize: yes", '`double_quantize`: must be true or false, not "yes"'),
        ("model: ''", '`model`: must not be empty, not ""'),
        ('output_dir: "a\\nb"',
         '`output_dir`: must be one line, without control characters, not "a\\nb"'),
        ("output_dir: 2026", "`output_dir`: must be text, not 2026"),
        ("version: 2", "`version`: must be 1, not 2"),
        ("data:", "`data`: must be a group of keys, not null"),
        ("lora: 16", "`lora`: must be a group of keys, not 16"),
        ("trian: {epochs: 1}", "unknown key `trian`; did you mean `train`?"),
        ("rank: 8", "unknown key `rank`; did you mean `lora.rank`?"),
        ("zzz: 8", "unknown key `zzz`"),
        ("lora: {model: x}", "unknown key `lora.model`; did you mean `model`?"),
        ("lora.rank: 8", "unknown key `lora.rank`; "
         "write `lora:` and, indented below it, `rank: …`"),
    ],
)  # fmt: skip
def test_mistake_is_reported_once_in_plain_words(text: str, mistake: str) -> None:
    assert mistakes(text) == [f"line 1: {mistake}"]


def test_long_wrong_value_is_shortened_in_the_message() -> None:
    (mistake,) = mistakes("train: {epochs: " + "x" * 500 + "}")
    assert len(mistake) < 120


@pytest.mark.parametrize(
    "text", ["- a", "text", "null", "42", "[", "a: !!str b", "a: &x 1", "a: " + "[" * 50, "\0"]
)
def test_text_that_is_not_a_mapping_is_one_mistake(text: str) -> None:
    assert len(mistakes(text)) == 1


def test_last_override_wins_over_others_and_the_file() -> None:
    recipe = recipes.parse_recipe(
        "lora: {rank: 4}", "", ["lora.rank=8", "train.learning_rate=1e-3", " lora.rank = 32 "]
    )
    assert (recipe.lora.rank, recipe.lora.alpha) == (32, 64)
    assert recipe.train.learning_rate == 1e-3
    assert (
        recipes.parse_recipe("", "", ["data.train=my #1 file.json"]).data.train == "my #1 file.json"
    )
    assert recipes.parse_recipe("", "", ["lora.target_modules=[q, v]"]).lora.target_modules == [
        "q",
        "v",
    ]


def test_list_of_sources_is_read_from_the_file_and_from_overrides() -> None:
    text = "data:\n  train:\n  - a.json\n  - source: b\n    share: 0.25\n"
    data = recipes.parse_recipe(text).data
    sources = [SourceRecipe(source="a.json"), SourceRecipe(source="b", share=0.25)]
    assert data.sources() == sources
    assert data.train_names() == "a.json, b (share 0.25)"
    assert repr(data.sources()) == "[{'source': 'a.json'}, {'source': 'b', 'share': 0.25}]"
    data = data.model_copy()
    data.rename_sources(str.upper)
    assert data.train_names() == "A.JSON, B (share 0.25)"
    data = recipes.parse_recipe(text).data
    override = "data.train=[a.json, {source: b, share: 0.25}]"
    assert recipes.parse_recipe("", "", [override]).data == data
    assert recipes.parse_recipe("", "", ["data.train=c.json"]).data.sources() == [
        SourceRecipe(source="c.json")
    ]


def test_mistake_in_a_list_item_has_the_items_line() -> None:
    text = "data:\n  train:\n  - a.json\n  - source: b\n    share: 2\n"
    assert mistakes(text) == ["line 5: `data.train[1].share`: must be at most 1, not 2"]
    override = "data.train=[a, {source: b, share: 3}]"
    assert mistakes(text, override) == ["--set: `data.train[1].share`: must be at most 1, not 3"]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("lora.rank", "--set 'lora.rank': write it as key=value"),
        ("=8", "--set '=8': write it as key=value"),
        ("", "--set '': write it as key=value"),
        ("lora.rnak=8", "--set: unknown key `lora.rnak`; did you mean `lora.rank`?"),
        ("rank=8", "--set: unknown key `rank`; did you mean `lora.rank`?"),
        ("data.train=[a, 5]", "--set: `data.train[1]`: must be text or a mapping of"),
        ("lora.rank.x=8", "--set: unknown key `lora.rank.x`; did you mean `lora.rank`?"),
        ("lora=8", "--set: `lora` is a group of keys; set one of them, as lora.KEY"),
        ("lora.rank=", '--set: `lora.rank`: must be a whole number, not ""'),
        ("lora.rank=0", "--set: `lora.rank`: must be at least 1, not 0"),
        ("train.learning_rate=-1", "--set: `train.learning_rate`: must be greater than 0, not -1"),
        ("output_dir=", '--set: `output_dir`: must not be empty, not ""'),
        ("output_dir=\udcff", "--set: `output_dir`: must be text that can be written as UTF-8"),
    ],
)
def test_wrong_override_is_reported_as_one_and_without_a_line(override: str, mistake: str) -> None:
    (message,) = mistakes("lora:\n  rank: 8\n", override)
    assert message.startswith(mistake)


def test_mistakes_of_file_and_overrides_are_reported_together() -> None:
    messages = mistakes("modle: x\nlora: 3\n", "lora.rank=0", "nonsense", "train.epochs=0")
    assert len(messages) == 4
    assert "line 2: `lora`: must be a group of keys, not 3" in messages


# Round trips


@settings(deadline=None)
@given(st.text(max_size=300))
def test_arbitrary_text_raises_nothing_but_recipe_errors(text: str) -> None:
    try:
        recipes.parse_recipe(text)
    except RecipeError as error:
        assert error.problems


_KEYS = [*recipes.fields(), "data", "lora", "train", "eval", "x", "lora.rnak", "0"]
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
        *sections, name = key.split(".")
        place: Any = nested
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[name] = value
    try:
        recipes.parse_recipe(
            json.dumps(nested), "x", [*overrides, *(f"{k}={v}" for k, v in values.items())]
        )
    except RecipeError as error:
        assert all(str(problem.message) for problem in error.problems)


# The schema for editors


# Files


SHIPPED = {
    "quickstart-zh", "phi-1_5-zh", "phi-1_5-zh-quick", "phi-1_5-zh-qlora", "phi-1_5-zh-int8",
    "phi-1_5-zh-seeed", "embedded-zh-1h", "qwen3-0.6b-zh", "qwen3-1.7b", "qwen3-4b-qlora",
    "llama-3.2-1b", "gemma-3-1b", "smollm2-360m",
}  # fmt: skip


def test_documented_recipes_are_shipped() -> None:
    assert set(recipes.shipped()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_recipe_is_loaded_by_its_name(name: str) -> None:
    recipe = recipes.load_recipe(name)
    assert recipe == recipes.load_recipe(recipes.shipped()[name])
    assert recipe == recipes.load_recipe(f"{name}.yaml")


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_recipe_has_a_comment_for_every_key(name: str) -> None:
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
        ("quickstart-zh", ("embedded", "bundled-short", "none")),
        ("phi-1_5-zh", ("microsoft/phi-1_5", "llamafactory/alpaca_zh", "none")),
        ("phi-1_5-zh-qlora", ("microsoft/phi-1_5", "llamafactory/alpaca_zh", "nf4")),
        ("phi-1_5-zh-int8", ("microsoft/phi-1_5", "llamafactory/alpaca_zh", "int8")),
        ("qwen3-0.6b-zh", ("Qwen/Qwen3-0.6B", "bundled", "none")),
        ("qwen3-4b-qlora", ("Qwen/Qwen3-4B", "llamafactory/alpaca_zh", "nf4")),
    ],
)
def test_shipped_recipe_has_the_settings_of_its_name(
    name: str, expected: tuple[str, str, str]
) -> None:
    recipe = recipes.load_recipe(name)
    assert (recipe.model, recipe.data.train, recipe.quantize) == expected


def test_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart-zh").write_text("model: mine", encoding="utf-8")
    assert recipes.load_recipe("quickstart-zh").model == "mine"


def test_folder_of_a_shipped_name_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart-zh").mkdir()
    assert recipes.load_recipe("quickstart-zh").model == "embedded"


@pytest.mark.parametrize(
    "name", ["", ".", "gone.yaml", "gone/quickstart-zh", "/etc", "quickstart", "quickstart-zh.txt"]
)
def test_missing_recipe_is_reported_with_the_shipped_names(name: str) -> None:
    with pytest.raises(UserError, match="Recipe not found") as caught:
        recipes.load_recipe(name)
    assert "quickstart-zh" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_impossible_path_is_refused_plainly(name: str) -> None:
    with pytest.raises(UserError):
        recipes.load_recipe(name)


def test_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: \xe5\x90\x8d")
    assert recipes.load_recipe(path).model == "名"


def test_byte_that_is_not_utf8_is_reported_with_line_and_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("# 注\nmodel: ".encode() + "中文".encode("gb18030"))
    with pytest.raises(RecipeError, match="line 2: not UTF-8 text") as caught:
        recipes.load_recipe(path)
    assert str(caught.value.where) == str(path)


def test_mistakes_of_a_file_are_reported_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("x: 1", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        recipes.load_recipe(path, ["lora.rank=0"])
    assert str(caught.value.where) == str(path)
    assert len(caught.value.problems) == 2
