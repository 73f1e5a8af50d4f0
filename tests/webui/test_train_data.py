"""The Train tab's rows: one field has the sources, and the widgets follow it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft import recipe as recipes
from jetson_ft.errors import RecipeError
from jetson_ft.recipe import SourceRecipe
from jetson_ft.runs import preview
from jetson_ft.webui import previews
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs import train_data
from jetson_ft.webui.tabs.train_data import Data, as_text, sources_of
from jetson_ft.webui.tabs.train_form import FIRST, Form, form_values

PAGE = SimpleNamespace(session_hash="one")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Return the widgets' functions; the rows are read in this process."""
    kept = previews.Previews()
    monkeypatch.setattr(train_data, "PREVIEWS", kept)

    def run_json(_module: str, text: str, **_options: Any) -> Any:
        return json.loads(json.dumps(asdict(preview.read_facts(recipes.parse_recipe(text)))))

    monkeypatch.setattr(previews, "run_json", run_json)
    return Data(Locale("en"), tmp_path, Form(Locale("en"), tmp_path))


def received(folder: Path, name: str, text: str = "question,answer\nq,a\n") -> str:
    """Return the path of a file as Gradio hands it over."""
    (folder / "incoming").mkdir(exist_ok=True)
    path = folder / "incoming" / name
    path.write_text(text)
    return str(path)


def values(model: Path, **changed: Any) -> list[Any]:
    shown = form_values(recipes.load_recipe(FIRST, [f"model={model}"])) | changed
    return [shown[key] for key in Form.ORDER]


def html_of(data: Data, *changed: Any) -> str:
    """Return what is shown at last of the rows."""
    *_earlier, (html, _list) = data.fetch_rows(PAGE, *changed)
    return str(html)


names = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1)
limits = st.one_of(
    st.just({}),
    st.builds(dict, share=st.floats(0, 1, exclude_min=True)),
    st.builds(dict, rows=st.integers(1)),
)


@given(st.lists(st.tuples(names, limits), min_size=1, max_size=4))
def test_sources_are_read_back_from_the_field(items: list[tuple[str, dict[str, Any]]]) -> None:
    sources = [SourceRecipe.model_validate({"source": name, **limit}) for name, limit in items]
    assert sources_of(as_text(sources)) == sources


def test_own_files_take_the_place_of_bundled_rows_and_join_each_other(
    data: Data, tmp_path: Path
) -> None:
    text, box = data.add_files(
        [received(tmp_path, "a.csv"), received(tmp_path, "b.csv")], "bundled"
    )
    assert box is None  # the list alone has them
    text, _box = data.add_name(" owner/name ", text)
    text, _box = data.add_name("owner/name", text)
    titles = [Path(item.source).name for item in sources_of(text)]
    assert titles == ["a.csv", "b.csv", "name"]
    kind, bundled, html = data.draw(text)
    assert (kind, bundled) == ("name", None)
    assert all(name in html for name in (">a.csv<", ">b.csv<", ">owner/name<"))
    assert html.count("data-source-share") == html.count("data-source-remove") == 3


def test_an_upload_that_can_not_be_stored_raises(data: Data, tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("")
    with pytest.raises(gr.Error, match="Expected a folder"):
        data.add_files([received(tmp_path, "a.csv")], "bundled")


def test_removing_a_source_removes_it(data: Data) -> None:
    text = as_text([SourceRecipe(source=name) for name in ("a/b", "c/d")])

    def act(text: str, **asked: Any) -> Any:
        return data.act(json.dumps(asked), text)

    text = act(text, do="remove", source="a/b")
    assert text == "c/d"
    assert act(text, do="remove", source="a/b") == gr.skip()  # clicked twice
    first = recipes.load_recipe(FIRST).data.train
    assert act(text, do="remove", source="c/d") == first  # never none
    kind, bundled, html = data.draw(str(first))
    assert (kind, bundled) == ("bundled", first) and "<li>" not in html


def test_a_share_is_set_in_percent(data: Data) -> None:
    text = as_text([SourceRecipe(source="a/b"), SourceRecipe(source="c/d")])
    for percent, share in (("50", 0.5), ("0.5", 0.005), ("100", None), ("900", None), ("", None)):
        action = json.dumps({"do": "share", "source": "c/d", "percent": percent})
        text = data.act(action, text)
        assert [item.share for item in sources_of(text)] == [None, share]


@pytest.mark.parametrize(
    "action", ["", "[]", "{}", '{"do": "remove", "source": "x"}', '{"do": "share", "source": 0}',
               '{"do": "share", "source": "bundled", "percent": "x"}', '{"source": null}'],
)  # fmt: skip
def test_actions_made_by_hand_change_nothing(data: Data, action: str) -> None:
    assert data.act(action, "bundled") == gr.skip()


def test_a_list_with_a_mistake_is_shown_as_one(data: Data) -> None:
    kind, _bundled, html = data.draw("[{source: a, share: 2}]")
    assert kind == "name" and 'role="alert"' in html
    with pytest.raises(RecipeError):
        sources_of("[{source: a, share: 2}]")


# --- the rows themselves ----------------------------------------------------------------------


def test_rows_are_shown_with_prompt_and_answer_and_as_tokens(
    data: Data, rows_file: Path, tiny_phi: Path
) -> None:
    html = html_of(data, *values(tiny_phi, **{"data.train": str(rows_file)}))
    assert html.count("<article") == preview.SAMPLES
    assert html.count("hidden>\n    <dl") == preview.SAMPLES - 5  # a page has five
    assert '<dt class="user">Prompt</dt>' in html and "<mark>" in html
    assert "40 rows" in html and f"1 / {preview.SAMPLES // 5}" in html
    # The list of sources has what was read.
    assert "40 rows · alpaca" in data.draw(str(rows_file))[2].replace("</b>", "")


def test_broken_rows_are_counted_with_a_button_that_skips_them(
    data: Data, tmp_path: Path, tiny_phi: Path
) -> None:
    path = received(tmp_path, "a.jsonl", '{"question": "q", "answer": "<a>"}\n{broken\n')
    own = {"data.train": path}
    html = html_of(data, *values(tiny_phi, **own))
    assert (
        "Broken rows: 1. Training would not start." in html
        and "line 2" in html
        and "&lt;a&gt;" in html
    )
    assert 'data-settings="data.on_invalid: skip">Skip the broken row<' in html
    html = html_of(data, *values(tiny_phi, **own, **{"data.on_invalid": "skip"}))
    assert "which are skipped: 1" in html and "data-settings" not in html


def test_nothing_is_downloaded_unless_it_is_asked_for(data: Data, tiny_phi: Path) -> None:
    ((html, _list),) = data.show_rows(PAGE, *values(tiny_phi, **{"data.train": "owner/name"}))
    assert "owner/name is on the Hub" in html
    first, *_rest = data.fetch_rows(PAGE, *values(tiny_phi, **{"data.train": "owner/name"}))
    assert "Downloading owner/name" in first[0]


def test_an_older_reading_shows_nothing_after_a_newer_choice(
    data: Data, rows_file: Path, tiny_phi: Path
) -> None:
    for newer in ({"data.train": "owner/name"}, {"lora.rank": 0}):  # which read nothing
        older = data.show_rows(PAGE, *values(tiny_phi, **{"data.train": str(rows_file)}))
        assert "Reading the rows" in next(older)[0]
        assert len([*data.show_rows(PAGE, *values(tiny_phi, **newer))]) == 1
        assert [*older] == [[gr.skip(), gr.skip()]]


def test_a_wrong_form_and_a_missing_file_are_reported(
    data: Data, tmp_path: Path, tiny_phi: Path
) -> None:
    assert html_of(data, *values(tiny_phi, **{"lora.rank": 0})) == ""  # marked in the form
    html = html_of(data, *values(tiny_phi, **{"data.train": str(tmp_path / "none.csv")}))
    assert "Data file not found" in html and "`" not in html


def test_estimates_are_called_so(data: Data, rows_file: Path) -> None:
    shown = values(Path("microsoft/phi-1_5"), **{"data.train": str(rows_file)})
    *_earlier, (html, _list) = data.show_rows(PAGE, *shown)
    assert "about" in html and "tokenizer is not on this machine" in html
    assert "data-rows-tokens" not in html
