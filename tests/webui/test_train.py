"""The Train tab's form: from values to a recipe and back, its mistakes, its command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from jetson_ft import recipe as recipes
from jetson_ft.errors import RecipeError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.run_settings import SETTINGS
from jetson_ft.webui.tabs.train_form import FIRST, Form, command_of, form_values


@pytest.fixture
def form(tmp_path: Path) -> Form:
    return Form(Locale("en"), tmp_path)


def values(name: str = FIRST, **changed: Any) -> list[Any]:
    shown = form_values(recipes.load_recipe(name))
    return [{**shown, **changed}[key] for key in Form.ORDER]


def mistakes_of(form: Form, **changed: Any) -> dict[str, Any]:
    with pytest.raises(RecipeError) as error:
        form.recipe(values(**changed))
    (text,) = form.mistakes(error.value, focus=True)
    marks: dict[str, Any] = json.loads(text)
    assert marks["focus"] is True
    return dict(marks["mistakes"])


@pytest.mark.parametrize("name", list(recipes.shipped()))
def test_the_form_of_a_recipe_is_that_recipe(name: str, form: Form) -> None:
    assert form.recipe(values(name)) == recipes.load_recipe(name, [f"output_dir={form.runs}"])


def test_mistakes_are_in_the_forms_words(tmp_path: Path) -> None:
    changed = {"lora.rank": None, "lora.dropout": 2, "data.train": "[a, {source: b, share: 2}]"}
    assert mistakes_of(Form(Locale("en"), tmp_path), **changed) == {
        "lora.rank": "must be a whole number, not empty",
        "lora.dropout": "must be less than 1, not 2",
        "data.train": "must be at most 1, not 2",
    }
    both = "[{source: b, share: 1, rows: 2}]"
    for language in ("en", "zh_CN"):
        shown = mistakes_of(Form(Locale(language), tmp_path), **{"data.train": both, "model": ""})
        assert set(shown) == {"data.train", "model"}
        for text in shown.values():
            assert not {"`", "--set", "null", str(tmp_path)} & {*text.split(), *text}
    assert mistakes_of(Form(Locale("zh_CN"), tmp_path), **{"lora.rank": 0}) == {
        "lora.rank": "不能小于 1，现在是 0"
    }


def test_no_mistakes_clear_the_marks_and_the_same_ones_are_shown_again(form: Form) -> None:
    assert json.loads(form.mistakes(None)[0])["mistakes"] == {}
    assert form.mistakes(None) != form.mistakes(None)  # else its box would have no event


def test_an_empty_field_stands_for_null(form: Form) -> None:
    recipe = form.recipe(values(**{"train.max_minutes": None, "data.chat_template": ""}))
    assert recipe.train.max_minutes is None and recipe.data.chat_template is None


def test_an_empty_alpha_follows_the_rank(form: Form) -> None:
    assert form_values(recipes.load_recipe(FIRST))["lora.alpha"] is None
    assert form.recipe(values(**{"lora.rank": 4})).lora.alpha == 8
    assert form_values(recipes.load_recipe(FIRST, ["lora.alpha=7"]))["lora.alpha"] == 7


def test_the_command_equals_the_form(form: Form) -> None:
    recipe = form.recipe(values(**{"lora.rank": 4, "data.train": "a b.json"}))
    arguments = shlex.split(command_of(recipe, FIRST).replace("\\\n", ""))
    assert arguments[:3] == ["jetson-ft", "train", FIRST]
    sets = [word for word in arguments[3:] if word != "--set"]
    assert set(sets) == {"lora.rank=4", "data.train=a b.json", f"output_dir={form.runs}"}
    assert recipes.load_recipe(FIRST, sets) == recipe
    kept = form.recipe(values(**{"lora.rank": 4, "lora.alpha": 32}))  # the default would follow
    assert "--set lora.alpha=32.0" in command_of(kept, FIRST)
    # A recipe of which the machine has no file by that name: the first one with all that differs.
    assert command_of(recipe, "mine; rm") == command_of(recipe, FIRST)


@pytest.mark.parametrize(
    "text",
    ["a.json, b c.jsonl", "a.json\nb c.jsonl\n", "a.json，b c.jsonl", "[a.json, b c.jsonl]"],
)
def test_several_sources_are_written_with_commas_or_a_line_each(form: Form, text: str) -> None:
    recipe = form.recipe(values(**{"data.train": text}))
    assert recipe.data.train == ["a.json", "b c.jsonl"]
    assert "--set 'data.train=[a.json, b c.jsonl]'" in command_of(recipe, FIRST)


def test_sources_with_shares_are_text_that_is_read_back(form: Form) -> None:
    sources = ["a, b.json", {"source": "c", "share": 0.5}]
    recipe = Recipe.model_validate({"data": {"train": sources}})
    text = form_values(recipe)["data.train"]
    assert text == "['a, b.json', {source: c, share: 0.5}]"
    assert form.recipe(values(**{"data.train": text})).data.train == recipe.data.train


def test_a_file_whose_name_has_a_comma_is_one_source(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "a, b.json"
    path.touch()
    assert form.recipe(values(**{"data.train": str(path)})).data.train == str(path)


@given(key=st.sampled_from([*SETTINGS]), value=st.none() | st.text() | st.floats() | st.booleans())
def test_any_value_makes_a_recipe_or_a_mistake_at_a_field(key: str, value: Any) -> None:
    form = Form(Locale("en"), Path("/nowhere"))
    try:
        form.recipe(values(**{key: value}))
    except RecipeError as error:
        assert set(json.loads(form.mistakes(error)[0])["mistakes"]) <= {key, ""}


def test_an_uploaded_recipe_is_handed_to_the_browser(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nlora:\n  rank: 3\n")
    outcome, text = form.load(str(path))
    loaded = json.loads(text)
    assert (outcome, loaded["title"], loaded["values"]["lora.rank"]) == ("", "mine", 3)
    assert set(loaded["values"]) == set(Form.ORDER)
    path.write_text("version: 1\nlora:\n  rnak: 3\n")
    outcome, text = form.load(str(path))
    assert "lora.rank" in outcome and text == ""


def test_an_address_with_copy_hands_a_runs_settings_to_the_browser(form: Form) -> None:
    sets = ["lora.rank=5", f"output_dir={form.runs}"]
    run = store.create_run(recipes.load_recipe(FIRST, sets), "x")
    run.write_state("finished")

    def open_address(query: str) -> Any:
        scope = {"type": "http", "query_string": query.encode(), "headers": []}
        return form.open_address(gr.Request(Request(scope)))

    outcome, text = open_address(f"copy={run.name}")
    loaded = json.loads(text)
    assert (outcome, loaded["title"], loaded["values"]["lora.rank"]) == ("", run.title(), 5)
    outcome, text = open_address("copy=../x")
    assert "complaint" in outcome and text == ""
    assert open_address("") == ["", ""]
