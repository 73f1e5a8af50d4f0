"""The model card: what it states, and that no text from outside becomes metadata or markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from run_folders import copy_finished

from jetson_ft.recipe import Recipe
from jetson_ft.runs.contents import DamagedRun
from jetson_ft.runs.report import card
from jetson_ft.runs.store import Run

HOSTILE = (
    "---\na: b\n---\n```\n````\n<script>x</script>|[l](http://e.vil)![i](x) \r\x1b[2J\u202e&lt;"
)
MARKUP = st.text(st.sampled_from("`-~<>|\n\\ #a[]()!&*_:"), max_size=40)
GGUF = {"kind": "gguf", "name": "gguf-q8_0", "merge": {
    "dtype": "fp16", "largest_logit_difference": 0.0123, "positions": 321, "rows": 4,
}}  # fmt: skip
CHECK = {
    "schema": 1, "reader": "llama.cpp b10605", "prompts": 20, "same_text": 19, "near_ties": 1,
    "heldout_rows": 4, "bits_per_character": {"adapter": 5.5, "export": 5.51}, "passed": True,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return copy_finished(tmp_path)


def metadata(text: str) -> dict[str, Any]:
    """Return the metadata as the Hub's client reads it."""
    return dict(ModelCard(text).data.to_dict())


def change_report(run: Run, **changes: Any) -> dict[str, Any]:
    """Change top-level keys of report.json; return its content."""
    path = run.path / "report.json"
    report: dict[str, Any] = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(report))
    return report


def change_recipe(run: Run, **changes: Any) -> None:
    recipe = Recipe.model_validate({**run.recipe().model_dump(), **changes})
    (run.path / "recipe.yaml").write_text(recipe.to_yaml())


def rendered_html(text: str) -> list[str]:
    """Return the pieces of HTML, links and pictures that a markdown reader finds in a card."""
    body = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    tokens += [child for token in tokens for child in token.children or []]
    kinds = ("html_block", "html_inline", "link_open", "image")
    return [token.content.strip() for token in tokens if token.type in kinds]


def test_the_card_states_base_data_recipe_and_figures(run: Run) -> None:
    change_recipe(run, model="embedded")
    text = card.model_card(run)
    values = metadata(text)
    assert values["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (values["base_model_relation"], values["library_name"]) == ("adapter", "peft")
    assert (values["license"], values["pipeline_tag"]) == ("apache-2.0", "text-generation")
    report = run.report()
    figures = {m["type"]: m["value"] for m in values["model-index"][0]["results"][0]["metrics"]}
    assert figures["loss"] == pytest.approx(report["eval"]["after"]["loss"], abs=1e-4)
    source = (run.last_data() or {})["read"]["sources"][0]
    for expected in (
        source["read"]["sha256"], report["data_sha256"], f"{report['train']['steps']:,}",
        "not given", "learning_rate: ", "jetson-ft train", "Apache-2.0", "4 bits (Q4_1)",
        f"{report['eval']['rows']} held-out rows only", "## Samples", "peft",
    ):  # fmt: skip
        assert expected in text
    assert "## Export" not in text and "More Information Needed" not in text


def test_the_cards_of_exports_state_kind_and_check(run: Run) -> None:
    change_recipe(run, model="o/n")
    text = card.model_card(run, GGUF, CHECK)
    assert metadata(text)["base_model_relation"] == "quantized"
    assert metadata(text)["library_name"] == "gguf" and "gguf" in metadata(text)["tags"]
    assert "19 of 20 held-out prompts; 1 differ" in text and "5.5100 bits per character" in text
    assert "0.0123, over 321 positions" in text and "Not checked" not in text
    assert "jetson-ft export RUN --format gguf --quantize q8_0\n" in text
    half = card.model_card(run, {**GGUF, "name": "gguf-f16"}, {"schema": 1, "checked": False})
    assert metadata(half)["base_model_relation"] == "finetune" and "**Not checked:**" in half
    merged = card.model_card(run, {**GGUF, "kind": "merged", "name": "merged"}, None)
    assert metadata(merged)["library_name"] == "transformers" and "**Not checked:**" in merged
    logits = {"schema": 1, "reader": "t", "logits": {"relative": 0.0012}, "bound": 0.01}
    assert "0.12% of their spread" in card.model_card(run, {**GGUF, "kind": "merged"}, logits)
    texts = card.model_card(run, GGUF, {**CHECK, "prompts": 0, "same_text": 0})
    assert "no texts were compared" in texts and "of 0 held-out prompts" not in texts
    lora = card.model_card(run, {"kind": "lora", "name": "lora"}, CHECK)
    assert metadata(lora)["base_model_relation"] == "adapter" and "--format lora\n" in lora


def test_what_is_not_known_is_said_and_not_guessed(run: Run) -> None:
    change_recipe(run, model="/home/someone/models/own")
    text = card.model_card(run)
    assert not {"license", "base_model", "base_model_relation", "datasets"} & set(metadata(text))
    assert "unknown: see the base model's page" in text and "**own**" in text
    assert "/home/someone" not in text


def test_licence_comes_from_the_bases_own_card_first(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    stored = json.loads((run.adapter / "base.json").read_text())
    (run.adapter / "base.json").write_text(json.dumps({**stored, "folder": str(base)}))
    change_recipe(run, model="embedded")
    for own, expected in (
        ("license: mit", "mit"),
        ("license: [a, b]", "apache-2.0"),
        ("license: '`<b>'", "apache-2.0"),
        ("x: [", "apache-2.0"),
        ("- x", "apache-2.0"),
    ):
        (base / "README.md").write_text(f"---\n{own}\n---\n")
        assert metadata(card.model_card(run))["license"] == expected


def test_data_sets_of_the_hub_and_bundled_rows_are_named(run: Run) -> None:
    report = run.report()
    part = report["data"]["sources"][0]
    names = ["o/rows/train.json", "bundled", "/home/x/o/rows.jsonl", "rows.jsonl"]
    change_report(run, data={**report["data"], "sources": [{**part, "name": n} for n in names]})
    text = card.model_card(run)
    assert metadata(text)["datasets"] == ["o/rows"]
    assert "CC0 1.0" in text and "a language model drafted" in text
    assert "/home/x" not in text


@pytest.mark.parametrize(
    ("question", "answer", "languages"),
    [
        ("What is the capital of France, and what is it known for?", "首都是巴黎。", ["zh", "en"]),
        ("第一个问题是什么？", "这是回答。", ["zh"]),
        ("Wie heißt die Hauptstadt von Frankreich und wofür steht sie?", "Paris, so weit.", None),
        ("日本の首都はどこですか", "東京です", None),
    ],
)
def test_languages_are_those_of_the_rows(
    run: Run, question: str, answer: str, languages: list[str] | None
) -> None:
    set_samples(run, question, answer)
    assert metadata(card.model_card(run)).get("language") == languages


def set_samples(run: Run, question: str, text: str) -> None:
    sample = {
        "row": 0, "messages": [{"role": "user", "content": question}], "reference": text,
        "reply": text, "ended": True,
    }  # fmt: skip
    evaluated = run.report()["eval"]
    sides = {side: {**evaluated[side], "samples": [sample]} for side in ("before", "after")}
    change_report(run, eval={**evaluated, **sides})


def test_limits_are_computed(run: Run) -> None:
    report = run.report()
    rows = {**report["data"]["train"], "rows": 200, "truncated": 30, "dropped": {"empty": 7}}
    after = {**report["eval"]["before"], "stop_rate": 0.25, "loss": 99.0}
    worse = {"difference": 96.0, "low": 90.0, "high": 99.0, "clear": True}
    warning = {"template": "Look at {path}", "values": {"path": "/home/x/some/rows.jsonl"}}
    change_report(
        run,
        data={**report["data"], "train": rows},
        train={**report["train"], "rows": 50},
        eval={**report["eval"], "after": after, "differences": {"loss": worse}},
        warnings=[{"message": "", "text": warning}],
    )
    change_recipe(run, quantize="nf4")
    text = card.model_card(run).split("## Limits")[1]
    for expected in (
        "15.0% of the training rows were cut at", "7 rows of its data", "It saw 25% of the",
        "75% of its replies", "Worse than the base in: Loss", "beside a base in nf4",
        "Look at rows.jsonl",
    ):  # fmt: skip
        assert expected in text
    assert "/home/x" not in text


def test_intervals_are_shown_where_the_report_has_them(run: Run) -> None:
    evaluated = run.report()["eval"]
    assert "95 % interval" not in card.model_card(run)
    interval = {"difference": -1.0, "low": -1.5, "high": -0.25, "clear": True}
    change_report(run, eval={**evaluated, "differences": {"bits_per_char": interval}})
    text = card.model_card(run)
    assert "95 % interval" in text and "-1.5 to -0.25" in text


@pytest.mark.parametrize("is_clear", [True, False])
def test_what_was_forgotten_is_stated(run: Run, is_clear: bool) -> None:
    probes = {
        "count": 64, "before": {"share": 0.5, "correct": []}, "lost": ["a", "b"], "gained": ["c"],
        "after": {"share": 0.25, "correct": []},
        "difference": {"difference": -0.25, "low": -0.4, "high": -0.1, "clear": is_clear},
    }  # fmt: skip
    change_report(run, eval={**run.report()["eval"], "probes": probes})
    results, limits = card.model_card(run).split("## Limits")
    assert "Of 64 short questions" in results and "50%, the trained model 25%" in results
    assert "it lost 2 that the base answers, and gained 1" in limits
    assert ("no clear difference" in limits) is not is_clear


def test_a_run_without_comparison_has_a_card(run: Run) -> None:
    change_report(run, eval=None, generation=None)
    text = card.model_card(run)
    assert "It was not compared with its base" in text
    assert "model-index" not in metadata(text) and "## Samples" not in text


def test_an_unfinished_run_has_no_card(run: Run) -> None:
    (run.path / "report.json").unlink()
    with pytest.raises(DamagedRun):
        card.write_card(run, run.adapter)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n---\r\n- b\u2028c", "a --- - b c"),
        ("&lt;b> <b>", "&amp;lt;b> &lt;b>"),
        ("a|b_c*", r"a\|b\_c\*"),
        ("x" * 300, "x" * 200 + "…"),
    ],
)
def test_a_text_in_a_line_has_neither_breaks_nor_markup(text: str, expected: str) -> None:
    assert card.inline(text) == expected


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return copy_finished(tmp_path_factory.mktemp("shared"))


@settings(max_examples=20, deadline=None)
@given(text=st.text(max_size=80).map(lambda text: text + HOSTILE) | MARKUP)
def test_text_from_outside_is_neither_metadata_nor_markup(shared: Run, text: str) -> None:
    run = shared
    plain = metadata(card.model_card(run))
    kept = {name: (run.path / name).read_bytes() for name in ("report.json", "about.json")}
    try:
        report = run.report()
        set_samples(run, text, text)
        part = {**report["data"]["sources"][0], "name": text}
        change_report(
            run,
            data={**report["data"], "sources": [part]},
            device={**report["device"], "name": text},
            versions={"jetson-ft": text, text: text},
            precision=text,
            warnings=[{"message": "", "text": {"template": "{t}", "values": {"t": text}}}],
        )
        (run.path / "about.json").write_text(json.dumps({"title": text}))
        card_text = card.model_card(run)
    finally:
        for name, content in kept.items():
            (run.path / name).write_bytes(content)
    values = metadata(card_text)
    values.pop("language", None), plain.pop("language", None)
    values.pop("datasets", None)  # a source may be named like one
    assert values == plain
    assert yaml.safe_load(card_text.split("---\n")[1]).keys() >= plain.keys()
    assert "\x1b" not in card_text and "\u202e" not in card_text
    own = ("<details>", "</details>", "<summary>", "</summary>")
    for piece in rendered_html(card_text):
        assert piece.startswith(own) and "script" not in piece and "http" not in piece
