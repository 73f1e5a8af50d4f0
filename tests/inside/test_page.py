"""The drawn views: texts that exist, a page that loads nothing, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from jetson_ft import i18n
from jetson_ft.chat.session import ChatSession
from jetson_ft.inside import page
from jetson_ft.inside.texts import view_texts
from jetson_ft.inside.views import VIEWS, compute_view
from jetson_ft.recipe import LoraRecipe, Recipe

SCRIPTS = [
    path for path in (files("jetson_ft.inside") / "static").iterdir() if path.suffix == ".js"
]
TEXT = "A cat. 猫坐在垫子上。"
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"


def test_every_text_that_the_drawing_names_exists() -> None:
    names = set(view_texts(str))
    used: set[str] = set()
    for script in SCRIPTS:
        code = script.read_text("utf-8")
        used |= set(re.findall(r'\bt\("(\w+)"', code))
        used |= {name for pair in re.findall(r'\? "(\w+)" : "(\w+)"\)', code) for name in pair}
        for prefix in re.findall(r"\bt\(`(\w+_)\$", code):
            assert any(name.startswith(prefix) for name in names), prefix
    assert used - names - {"light", "dark", "current", ""} == set()
    for view in VIEWS:
        assert {f"{view}_heading", f"{view}_caption"} <= names


def test_captions_are_at_most_two_sentences_in_each_language() -> None:
    for language in i18n.languages():
        for name, text in view_texts(i18n.translator(language)).items():
            if name.endswith("_caption"):
                assert 1 <= len(re.findall(r"[.。](?:\s|$|(?=\S))", text)) <= 2, text


@pytest.fixture(scope="module")
def views(tiny_phi: Path) -> dict[str, Any]:
    """Return every view of a tiny model with an adapter, from a text that is hostile HTML too."""
    import torch

    from jetson_ft import adapter
    from jetson_ft.models import loading
    from jetson_ft.models.files import BaseModelFiles

    base = BaseModelFiles(str(tiny_phi), tiny_phi)
    model = loading.load_model(base, loading.WeightFormat("fp32"), "cpu")
    model = adapter.attach_adapter(model, LoraRecipe(rank=2), 0).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    recipe = Recipe(model=str(tiny_phi), lora=LoraRecipe(rank=2))
    loaded = ChatSession(model, loading.load_tokenizer(base), True, 2048, recipe=recipe)
    options: dict[str, dict[str, Any]] = {
        "tokens": {"text": TEXT, "answer": f"好。{EVIL}"},
        "attention": {"text": TEXT},
        "attention_example": {"text": TEXT, "layer": 1, "head": 2},
        "next_token": {"text": EVIL, "sampling": {"temperature": 0.7, "top_k": 5}},
        "reply": {"text": "你好", "answer": "好的。"},
        "in_context": {"text": EVIL, "examples": [("a", "b"), ("c", "d")], "answer": "e"},
    }
    results = {view: compute_view(loaded, view, options.get(view, {})) for view in VIEWS}
    return dict(json.loads(json.dumps(results)))


def test_page_loads_nothing_and_no_text_ends_its_script(views: dict[str, Any]) -> None:
    text = page.render_page(views, EVIL)
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)\s*=\s*"?\s*(https?:)?//|@import|url\(', text)
    assert text.count("</script>") == 1 and "<img" not in text
    assert "\nimport " not in text and "\nexport " not in text


@pytest.fixture
def opened(browser: Any, views: dict[str, Any], tmp_path: Path) -> Iterator[Any]:
    """Return a browser's page with all views; the test fails on an error or a request."""
    path = tmp_path / "views.html"
    page.write_page(path, views, "tiny")
    faults: list[str] = []
    tab = browser.new_page(viewport={"width": 390, "height": 900}, locale="en-GB")
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    tab.on("request", lambda request: request.url.startswith("file:") or faults.append(request.url))
    tab.goto(path.as_uri())
    tab.locator("article.inside").nth(len(views) - 1).wait_for()
    yield tab
    assert faults == [] and tab.title() == "tiny · jetson-ft"


def article(tab: Any, heading: str) -> Any:
    return tab.locator("article.inside").filter(
        has=tab.get_by_role("heading", level=2, name=heading)
    )


@pytest.mark.slow(minutes=0.1)
def test_each_view_is_drawn_at_phone_width_and_in_chinese(opened: Any) -> None:
    assert opened.locator("article.inside h2").count() == len(VIEWS)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert opened.evaluate(overflow) <= 0
    opened.get_by_role("button", name="简体中文").click()
    headings = opened.locator("article.inside h2").all_inner_texts()
    assert headings[:2] == ["词元", "注意力"] and len(headings) == len(VIEWS)
    assert "undefined" not in opened.locator("body").inner_text()
    assert opened.evaluate(overflow) <= 0


@pytest.mark.slow(minutes=0.1)
def test_map_is_read_by_pointer_and_by_arrow_keys(opened: Any, views: dict[str, Any]) -> None:
    attention = article(opened, "Attention").first
    head = attention.get_by_label("Head", exact=True)
    head.select_option("1")
    canvas = attention.locator(".heat canvas").first
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        canvas.press(key)
    probability = views["attention"]["sides"]["base"]["layers"][1]["heads"]["1"][1][1]
    readout = attention.locator(".map .readout").first
    assert readout.inner_text().startswith("1: · attends to 1: ·: ")
    assert f"{100 * probability:.0f}" in readout.inner_text()
    canvas.press("ArrowRight")
    assert readout.inner_text() == "2: c is masked for 1: ·: it comes later."
    layer = attention.get_by_label("Layer", exact=True)
    layer.select_option("rollout")
    assert attention.get_by_label("Head", exact=True).count() == 0
    assert not attention.get_by_role("heading", name="All heads of this layer").is_visible()
    assert "null" not in attention.inner_text()
    layer.select_option("0")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] - 30, "y": box["height"] - 8})
    assert "attends to" in readout.inner_text()


@pytest.mark.slow(minutes=0.1)
def test_a_marked_cell_is_painted_alone_as_the_whole_map_is(opened: Any) -> None:
    attention = article(opened, "Attention").first
    canvas = attention.locator(".heat canvas").first
    opened.evaluate(
        """() => {
          const type = CanvasRenderingContext2D.prototype, own = type.fillText;
          window.labels = 0;
          type.fillText = function (...values) { window.labels += 1; own.apply(this, values); };
        }"""
    )
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        canvas.press(key)
    assert opened.evaluate("window.labels") == 0, "each label is drawn with the whole map"
    image = "canvas => canvas.toDataURL()"
    marked = canvas.evaluate(image)
    opened.evaluate("document.body.classList.toggle('other')")  # as a change of the theme
    opened.wait_for_function("window.labels > 0")
    assert canvas.evaluate(image) == marked
    canvas.press("ArrowUp")
    assert canvas.evaluate(image) != marked


@pytest.mark.slow(minutes=0.1)
def test_reply_is_stepped_through_with_keys_and_buttons(opened: Any) -> None:
    reply = article(opened, "A reply, token by token")
    chips = reply.get_by_role("option")
    assert chips.nth(0).inner_text() == "好₁" and chips.nth(2).inner_text() == "好₃"
    chips.nth(0).click()
    heading = reply.locator(".readout").first
    assert heading.inner_text().startswith("1: 好₁")
    reply.get_by_role("button", name="Next").click()
    assert heading.inner_text().startswith("2: 好₂")
    chips.nth(1).click()
    chips.nth(1).press("ArrowRight")
    assert heading.inner_text().startswith("3: 好₃")
    assert reply.locator(".candidates li").count() == 2 * 5


@pytest.mark.slow(minutes=0.1)
def test_steps_of_sampling_cut_tokens_and_adapters_layers_are_picked(opened: Any) -> None:
    following = article(opened, "Next token")
    assert following.locator(".candidates li.cut").count() > 0
    following.get_by_role("button", name="the model").click()
    assert following.locator(".candidates li.cut").count() == 0
    change = article(opened, "The adapter")
    before = change.locator(".key").last.inner_text()
    canvas = change.locator(".heat canvas")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        canvas.press(key)
    after = change.locator(".key").last.inner_text()
    assert "k_proj, layer 0" in after and after != before
    assert opened.locator("img").count() == 0
