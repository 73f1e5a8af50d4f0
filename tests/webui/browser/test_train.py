"""The Train tab's form in a browser: recipes, changes, mistakes and the draft."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from in_browser import open_tab
from served import Served
from workbench import LightRuns

from jetson_ft import recipe as recipes
from jetson_ft.runs import store
from jetson_ft.webui.tabs.train_form import FIRST, Form

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=20_000)  # milliseconds; other tests share the machine
pytestmark = pytest.mark.slow
QWEN = "qwen3-0.6b-zh"


def field(page: Any, key: str) -> Any:
    return page.locator(f"#field-{key.replace('.', '-')}")


def value(page: Any, key: str) -> Any:
    return field(page, key).locator("input, textarea")


def open_form(page: Any, served: Served, language: str = "en") -> None:
    open_tab(page, served, language=language)
    expect(page.locator(".recipe input:checked")).to_have_count(1)


def choose(page: Any, name: str) -> None:
    page.locator(f".recipe input[value='{name}']").check(force=True)


def sent_to_start(page: Any) -> dict[str, Any]:
    """Press Start with a mistake, so that nothing starts; return the values that are sent."""

    def values_of(request: Any) -> dict[str, Any]:
        data = request.post_data_json["data"] if "/queue/join" in request.url else []
        return dict(zip(Form.ORDER, data[-len(Form.ORDER) :], strict=False))

    value(page, "lora.rank").fill("0")
    with page.expect_request(lambda request: values_of(request).get("lora.rank") == 0) as request:
        page.get_by_role("button", name="Start", exact=True).click()
    return values_of(request.value)


def test_a_recipe_sets_all_fields_also_those_that_are_folded(page: Any, served: Served) -> None:
    open_form(page, served)
    choose(page, QWEN)
    expect(value(page, "train.learning_rate")).to_have_value("0.0002")
    expect(value(page, "train.max_minutes")).to_have_value("")
    expect(page.locator("#group-training")).not_to_contain_text("Tokens per step")
    sent = sent_to_start(page)
    recipe = recipes.load_recipe(QWEN)
    assert sent["train.tokens_per_step"] == recipe.train.tokens_per_step == 2048
    assert sent["model"] == recipe.model and sent["lora.alpha"] is None
    assert sent["data.train"] == "bundled"


def test_another_recipe_keeps_the_users_rows_and_says_so(page: Any, served: Served) -> None:
    open_form(page, served)
    page.evaluate(
        "jetsonFt.setFields({'data.train': '/u/1a2b/rows.csv', 'data.columns.answer': 'b'})"
    )
    choose(page, QWEN)
    expect(page.locator("#goal-notice")).to_have_text("Kept: your rows.csv.")
    expect(value(page, "model")).to_have_value(re.compile("^Qwen/Qwen3-0.6B"))
    sent = sent_to_start(page)
    assert (sent["data.train"], sent["data.columns.answer"]) == ("/u/1a2b/rows.csv", "b")
    page.evaluate("jetsonFt.setFields({'data.train': 'bundled-short'})")
    choose(page, FIRST)
    choose(page, QWEN)  # rows of a recipe follow the recipe
    expect(page.locator("#goal-notice")).to_be_empty()
    assert sent_to_start(page)["data.train"] == "bundled"


def test_mistakes_are_unfolded_counted_and_go_when_fixed(page: Any, served: Served) -> None:
    open_form(page, served)
    page.locator("#group-lora button").first.click()
    value(page, "lora.dropout").fill("3")
    value(page, "lora.dropout").blur()
    page.locator("#group-lora button").first.click()
    expect(page.locator("#group-lora > button")).to_have_attribute("aria-expanded", "false")
    expect(value(page, "lora.dropout")).to_be_hidden()
    page.evaluate("jetsonFt.setFields({'train.warmup_steps': -1})")  # in a group never unfolded
    page.get_by_role("button", name="Start", exact=True).click()
    attention = page.locator("#attention")
    expect(attention).to_contain_text("Fields that need attention: 2")
    dropout, warmup = value(page, "lora.dropout"), value(page, "train.warmup_steps")
    expect(dropout).to_be_focused()
    expect(dropout).to_have_attribute("aria-invalid", "true")
    expect(dropout).to_have_accessible_description("must be less than 1, not 3")
    colours = "box => [getComputedStyle(box).borderColor, getComputedStyle(box).color]"
    border, text = dropout.evaluate(colours)
    mark = field(page, "lora.dropout").locator(".mistake")
    assert border == mark.evaluate("box => getComputedStyle(box).color") != text

    attention.get_by_role("button", name="Warm-up (steps)").click()
    expect(warmup).to_be_focused()
    warmup.fill("4")
    expect(attention).to_contain_text("Fields that need attention: 1")
    expect(warmup).not_to_have_attribute("aria-invalid", "true")
    dropout.fill("0")
    expect(attention).to_be_hidden()
    assert page.locator(".mistake").count() == 0


def test_a_change_is_marked_and_can_be_reset(page: Any, served: Served) -> None:
    open_form(page, served)
    value(page, "lora.rank").fill("4")
    reset = field(page, "lora.rank").get_by_role("button")
    expect(reset).to_have_accessible_name("Rank: Reset to 16")
    reset.click()
    expect(value(page, "lora.rank")).to_have_value("16")
    expect(value(page, "lora.rank")).to_be_focused()
    expect(reset).to_have_count(0)
    page.evaluate("jetsonFt.setFields({'train.seed': 5})")  # folded
    title = page.locator("#group-training button > span").first
    expect(title).to_have_attribute("data-changed", "1 changed")
    after = title.evaluate("title => getComputedStyle(title, '::after').content")
    assert after == '"1 changed"'
    page.locator("#group-training button").first.click()
    expect(field(page, "train.seed").get_by_role("button")).to_have_text("Reset to 0")


def test_the_draft_is_kept_over_a_reload_and_a_change_of_language(
    page: Any, served: Served
) -> None:
    open_form(page, served)
    choose(page, QWEN)
    value(page, "lora.rank").fill("4")
    page.evaluate("jetsonFt.setFields({'data.train': '/u/rows.csv', 'eval.samples': 3})")
    page.reload()
    expect(value(page, "lora.rank")).to_have_value("4")
    page.get_by_role("button", name="简体中文").click()
    page.wait_for_url("**/zh_CN/**")
    expect(value(page, "lora.rank")).to_have_value("4")
    assert page.locator(".recipe input:checked").input_value() == QWEN
    page.locator("#group-evaluation button").first.click()
    expect(value(page, "eval.samples")).to_have_value("3")
    expect(field(page, "eval.samples").get_by_role("button")).to_have_text("恢复为 8")
    page.get_by_role("button", name="重新开始").click()
    expect(value(page, "lora.rank")).to_have_value("16")
    assert page.locator(".recipe input:checked").input_value() == FIRST
    page.reload()
    expect(value(page, "lora.rank")).to_have_value("16")
    expect(page.get_by_role("button", name="重新开始")).to_be_hidden()


@pytest.mark.parametrize(
    "draft", ["{", "[]", '{"name": "x", "values": {"lora.rank": {}, "no.key": 1}}', '"text"']
)
def test_a_draft_that_can_not_be_read_is_ignored(page: Any, served: Served, draft: str) -> None:
    page.add_init_script(f"localStorage.setItem('jetson-ft-draft', {json.dumps(draft)})")
    open_form(page, served)
    expect(value(page, "lora.rank")).to_have_value("16")


def test_an_uploaded_recipe_has_a_card_of_its_own(
    page: Any, served: Served, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lora: {rank: 3}\ntrain: {seed: 7}\n")
    open_form(page, served)
    upload = page.locator("#decision-goal input[type=file]")
    upload.set_input_files(path)
    expect(page.locator("#goal-notice")).to_have_text("The form has the settings of mine.")
    expect(value(page, "lora.rank")).to_have_value("3")
    checked = page.locator(".recipe:has(:checked)")
    expect(checked).to_have_text("mine")
    page.reload()
    expect(value(page, "lora.rank")).to_have_value("3")
    expect(checked).to_have_text("mine")
    path.write_text("lora: {rnak: 3}\n")
    upload.set_input_files(path)
    expect(page.locator("#form-notice [role=alert]")).to_contain_text("lora.rank")
    expect(value(page, "lora.rank")).to_have_value("3")


def test_a_runs_settings_are_loaded_once(page: Any, served: Served, runs: LightRuns) -> None:
    """A reload or a change of language leaves what was changed afterwards."""
    (run,) = [run for run in store.list_runs(runs.root) if run.name.endswith("waiting")]
    page.goto(f"{served.base}/en/?copy={run.name}#train")
    expect(page.locator("#goal-notice")).to_contain_text(run.title())
    expect(value(page, "train.learning_rate")).to_have_value("0.0002")  # the default
    assert "copy" not in page.url
    value(page, "lora.rank").fill("4")
    page.reload()
    expect(value(page, "lora.rank")).to_have_value("4")
    expect(value(page, "train.learning_rate")).to_have_value("0.0002")


def test_an_uploaded_recipe_without_rows_keeps_the_users(
    page: Any, served: Served, tmp_path: Path
) -> None:
    open_form(page, served)
    page.evaluate("jetsonFt.setFields({'data.train': '/u/1a2b/rows.csv'})")
    for text, rows in (("lora: {rank: 3}", "/u/1a2b/rows.csv"), ("data: {train: b.csv}", "b.csv")):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with page.expect_file_chooser() as chooser:  # of the same name again, as after an edit
            page.get_by_role("button", name="Upload a recipe file").click()
        chooser.value.set_files(path)
        expect(page.locator("#goal-notice")).to_have_text(
            re.compile(r"Kept: your rows.csv.$" if rows != "b.csv" else r"settings of mine.$")
        )
        assert sent_to_start(page)["data.train"] == rows


def test_the_cards_say_how_each_recipe_fits(page: Any, served: Served) -> None:
    open_form(page, served)
    badges = page.locator("#first-recipes [data-fit]")
    expect(badges.first).to_have_text(re.compile("fit|tight"))
    assert all(badges.all_inner_texts())


def test_the_cards_are_radio_buttons(page: Any, served: Served) -> None:
    open_form(page, served)
    page.locator(".recipe input:checked").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".recipe input:checked")).to_have_value("embedded-zh-1h")
    expect(value(page, "lora.rank")).to_have_value("32")
    card = page.locator(".recipe:has(:checked)")
    assert card.evaluate("card => getComputedStyle(card).outlineWidth") == "2px"
