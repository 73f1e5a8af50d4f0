"""The Train tab's fields: a component for each key, with names for people; and the recipe cards."""

from __future__ import annotations

import json
import re
from types import NoneType
from typing import Any, get_args

import pytest

from jetson_ft import i18n
from jetson_ft import recipe as recipes
from jetson_ft.models import catalog
from jetson_ft.runs.recipe_fits import RecipeFit
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.run_settings import SETTINGS
from jetson_ft.webui.tabs import train_goal, train_settings
from jetson_ft.webui.tabs.train_form import DATA, FIRST, Form, form_values


@pytest.fixture(scope="module", params=list(i18n.languages()))
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    with gr.Blocks():
        values = form_values(recipes.load_recipe(FIRST))
        return train_settings.components(Locale(request.param), values)


def test_each_key_has_a_component_of_its_type(fields: dict[str, Any]) -> None:
    assert (*fields, DATA) == Form.ORDER
    kinds = {key: type(field) for key, field in fields.items()}
    for key in (*train_settings.ESSENTIAL, "lora.alpha", "train.seed", "train.max_memory_gb"):
        assert kinds[key] is gr.Number
    assert kinds["lora.dora"] is gr.Checkbox and kinds["train.lr_scheduler"] is gr.Dropdown
    assert kinds["data.heldout"] is kinds["train.eval_every"] is gr.Textbox  # several types


def test_labels_and_help_are_for_people(fields: dict[str, Any]) -> None:
    for key, field in fields.items():
        assert field.label and "_" not in field.label and field.label != key
        assert field.info and len(field.info) <= 150 and "null" not in field.info
        if NoneType in get_args(SETTINGS[key].annotation):
            assert field.placeholder, f"what an empty {key} means"


def test_labels_differ(fields: dict[str, Any]) -> None:
    labels = [field.label for field in fields.values()]
    assert len(set(labels)) == len(labels)


def test_each_key_has_one_place() -> None:
    folded = train_settings.group_ids()
    placed = [*train_settings.MODEL, *train_settings.ESSENTIAL, *folded, DATA]
    assert sorted(placed) == sorted(SETTINGS)
    assert folded["train.eval_every"] == "group-evaluation"
    assert folded["train.on_oom"] == "group-device" and folded["lora.alpha"] == "group-lora"


def test_the_models_are_listed_with_what_decides_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    downloaded = ["Qwen/Qwen3-0.6B", "me/mine"]
    monkeypatch.setattr(train_settings.hub, "downloaded_models", lambda: downloaded)
    choices = {name: label for label, name in train_settings._models(Locale("en"))}
    assert list(choices) == [*catalog.MODELS, "me/mine"]
    assert choices["Qwen/Qwen3-0.6B"] == "Qwen/Qwen3-0.6B · 1.5 GB · Apache-2.0 · on this machine"
    assert choices["me/mine"] == "me/mine · on this machine"
    gated = choices["meta-llama/Llama-3.2-1B-Instruct"]
    assert gated.endswith("2.5 GB · Llama 3.2 · terms to accept · needs download")
    assert choices["embedded"].endswith("on this machine")


# --- the recipe cards --------------------------------------------------------------------------


@pytest.mark.parametrize("language", list(i18n.languages()))
def test_each_recipe_has_a_card_with_title_text_and_model(language: str) -> None:
    for name in recipes.shipped():
        model = recipes.load_recipe(name).model
        card = train_goal._card(name, model, Locale(language))
        assert all(card.values()) and len(card["title"]) < 30
        assert re.fullmatch(r"[\w.-]+ · \d+\.\d GB", card["model"])
    assert set(train_goal.SHOWN) < set(recipes.shipped())


@pytest.mark.parametrize(
    ("changed", "style", "badge", "time"),
    [
        ({}, "fits", "fits", "about 6 min"),
        ({"verdict": "tight", "seconds": 4 * 3600.0}, "tight", "tight", "about 4 h"),
        ({"needs_download": True, "seconds": 1e6}, "download", "needs download", "about 12 days"),
        (
            {"verdict": "too_large", "needs_download": True, "seconds": None},
            "too_large", "won't fit", "",
        ),
    ],
)  # fmt: skip
def test_the_badge_says_what_stands_in_the_way(
    changed: dict[str, Any], style: str, badge: str, time: str
) -> None:
    fit = RecipeFit(**{
        "verdict": "fits", "peak_memory_bytes": 2**30, "memory_bytes": 4 * 2**30,
        "seconds": 350.0, "needs_download": False, **changed,
    })  # fmt: skip
    shown = train_goal._fit(fit, Locale("en"))
    assert (shown["style"], shown["badge"], shown["time"]) == (style, badge, time)
    assert shown["memory"] == "1.0 of 4.0 GiB (estimate)"


def test_the_fits_are_sent_for_each_recipe() -> None:
    sent = json.loads(train_goal._fits_text(Locale("zh_CN")))
    assert set(sent) == set(recipes.shipped())
    assert sent[FIRST]["badge"] in ("放得下", "勉强放下", "放不下")
