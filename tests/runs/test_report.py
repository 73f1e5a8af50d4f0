"""The report: a contract for programs, and a page that a person would send to a colleague."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.recipe import Recipe
from jetson_ft.runs import report, rundir, sensed
from jetson_ft.runs.rundir import EventLog, Run

# The contract of report.json; beyond it stand `data` and, in `train`, `best_step` and
# `stopped_early`.
TOP = {
    "schema", "recipe_sha256", "model", "versions", "precision", "data_sha256", "seed",
    "generation", "device", "train", "plan", "eval", "data", "sensors",
}  # fmt: skip
TRAIN = {
    "steps", "seconds", "rows", "tokens", "supervised_tokens", "tokens_per_second",
    "peak_memory_bytes", "energy_joules", "joules_per_token", "final_loss", "best_step",
    "stopped_early",
}  # fmt: skip
SIDE = {
    "loss", "bits_per_char", "chinese_share", "stop_rate", "repetition", "chrf", "bleu", "samples",
}  # fmt: skip
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x onerror=y>&amp;'


@pytest.fixture(scope="module")
def made(finished: Run) -> dict[str, Any]:
    """report.json of a whole run."""
    found: dict[str, Any] = json.loads((finished.path / "report.json").read_text())
    return found


def test_report_holds_exactly_the_contracts_keys(made: dict[str, Any]) -> None:
    assert set(made) == TOP and made["schema"] == 1
    assert set(made["train"]) == TRAIN
    assert set(made["plan"]) == {"peak_memory_bytes", "seconds"}
    assert set(made["eval"]) == {"rows", "before", "after"}
    assert set(made["eval"]["before"]) == set(made["eval"]["after"]) == SIDE
    assert made["generation"].keys() >= {"method", "max_new_tokens"}


def test_report_tells_what_was_done(made: dict[str, Any], finished: Run) -> None:
    recipe, train = finished.recipe(), made["train"]
    assert made["recipe_sha256"] == recipe.sha256() and made["model"] == recipe.model
    assert (made["precision"], made["seed"]) == ("fp32", 0)
    assert (train["rows"], made["eval"]["rows"]) == (35, 5)
    assert train["tokens"] == made["data"]["train"]["tokens"]
    assert train["supervised_tokens"] == made["data"]["train"]["supervised_tokens"]
    assert train["peak_memory_bytes"] > 50 * 2**20 and train["energy_joules"] is None
    assert {"torch", "transformers", "peft", "jetson-ft"} <= set(made["versions"])
    assert len(made["eval"]["after"]["samples"]) == 2


def test_tokens_per_second_are_of_training_alone(made: dict[str, Any], finished: Run) -> None:
    last = [event for event in finished.events() if event["kind"] == "step"][-1]
    assert made["train"]["tokens_per_second"] == pytest.approx(last["tokens_per_second"], rel=1e-3)


@pytest.mark.parametrize(("steps", "expected"), [(20, 19.5), (3, 3.0), (0, None)])
def test_final_loss_is_the_mean_of_the_last_tenth(
    made: dict[str, Any], tmp_path: Path, steps: int, expected: float | None
) -> None:
    run = rundir.create(Recipe(output=str(tmp_path)), "x")
    log = EventLog(run, 1)
    for step in range(1, steps + 1):
        log.emit("step", step=step, loss=float(step))
    progress = {"step": steps, "train_seconds": 2.0, **made["train"]}
    facts = {**made, "progress": progress, "peak_memory_bytes": 1}
    assert report.compose(run, facts)["train"]["final_loss"] == expected


# --- what the sensors said ------------------------------------------------------------------


def sampled(root: Path) -> list[dict[str, Any]]:
    """Events of a board that was hot and short of current, in two attempts."""
    run = rundir.create(Recipe(output=str(root)), "hot")
    first, second = EventLog(run, 1), EventLog(run, 2)
    for step, throttled, count in ((1, 0.0, 0), (2, 4.0, 3), (3, 9.0, 20)):
        first.emit("sample", step=step, source="sysfs", watts=20.0, temperature=98.0 + step,
                   throttled_seconds=throttled, over_current={"oc1": 0, "oc3": count})  # fmt: skip
    first.emit("pause_end", step=1, seconds=12.5, temperature=80.0)
    second.emit("sample", step=3, source="tegrastats", throttled_seconds=1.0,
                over_current={"oc1": 1, "oc3": 5})  # fmt: skip
    return run.events()


def test_sensors_are_summed_over_the_attempts_without_the_lost_steps(tmp_path: Path) -> None:
    assert sensed.summary(sampled(tmp_path)) == {
        "source": "tegrastats", "max_temperature": 100.0, "throttled_seconds": 5.0,
        "over_current": {"oc1": 1, "oc3": 8}, "paused_seconds": 12.5,
    }  # fmt: skip
    assert sensed.summary([{"kind": "step", "step": 1}]) is None


def test_heat_and_want_of_current_are_named_where_people_look(
    made: dict[str, Any], tmp_path: Path
) -> None:
    hot = copy.deepcopy(made)
    hot["sensors"] = sensed.summary(sampled(tmp_path))
    hot["train"] |= {"energy_joules": 4321.0, "joules_per_token": 0.1234}
    text, page = report.markdown("demo", hot), Page(report.html("demo", hot, []))
    assert "4,321 J (0.123 J/token)" in text and "4,321 J" in page.text and "100 °C" in page.text
    for said in (
        "lowered its clocks because of heat, for about 5 s", "paused for 12 s to let it cool",
        "the input voltage fell too low (oc1: 1)", "the current peaked too high (oc3: 8)",
    ):  # fmt: skip
        assert said in text and said in page.text
    assert "因过热而降频约 5 秒" in page.text


def test_what_wasnt_measured_isnt_mentioned(made: dict[str, Any]) -> None:
    bare = copy.deepcopy(made)
    bare["sensors"] = None
    bare["train"] |= {"energy_joules": None, "joules_per_token": None}
    text, page = report.markdown("demo", bare), Page(report.html("demo", bare, []))
    assert "J/token" not in text + page.text and "°C" not in page.text
    assert sensed.complaints(None) == []


@pytest.mark.parametrize(
    ("joules", "tokens", "expected"),
    [(100.0, 400, (100.0, 0.25)), (None, 400, (None, None)), (0.0, 0, (None, None))],
)
def test_energy_by_token(joules: Any, tokens: int, expected: Any) -> None:
    found = report._energy({"energy_joules": joules, "tokens": tokens})
    assert tuple(found.values()) == expected


# --- verdicts and durations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "before", "after", "verdict", "shown"),
    [
        ("loss", 3.0, 2.0, "better", "2.000"),
        ("bits_per_char", 3.0, 3.5, "worse", "3.500"),
        ("chinese_share", 0.1, 0.95, "better", "95%"),
        ("repetition", 0.1, 0.2, "worse", "20%"),
        ("stop_rate", 0.5, 0.5, "same", "50%"),
        ("chrf", 10.0, 12.34, "better", "12.3"),
    ],
)
def test_better_and_worse(
    made: dict[str, Any], key: str, before: float, after: float, verdict: str, shown: str
) -> None:
    changed = copy.deepcopy(made)
    changed["eval"]["before"][key], changed["eval"]["after"][key] = before, after
    (row,) = [row for row in report.rows_of_figures(changed) if row["key"] == key]
    assert (row["verdict"], row["after"]) == (verdict, shown)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (3600, "1 h 00 min"),
     (3721, "1 h 02 min"), (200_000, "55 h 33 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


# --- the page --------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(finished: Run) -> str:
    return (finished.path / "report.html").read_text(encoding="utf-8")


def test_the_page_fetches_nothing(html: str) -> None:
    assert not re.search(r"(?i)https?://|//[a-z]|@import|url\(", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert "default-src 'none'" in html


def test_the_page_shows_curves_figures_and_pairs(html: str, made: dict[str, Any]) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 1
    assert tags.count("tr") == 1 + len(report.FIGURES)
    assert sum(a.get("class") == "card pair" for _, a in page.tags) == 2
    for sample in made["eval"]["after"]["samples"]:
        assert sample["reference"] in page.text


def test_the_page_speaks_both_languages(html: str) -> None:
    assert html.count('class="en"') == html.count('class="zh"') > 10


@pytest.mark.parametrize("place", ["reply", "reference", "prompt", "name", "model"])
def test_what_models_and_people_write_stays_text(
    made: dict[str, Any], finished: Run, place: str
) -> None:
    spoilt, name = copy.deepcopy(made), "run"
    sample = spoilt["eval"]["after"]["samples"][0]
    before = spoilt["eval"]["before"]["samples"][0]
    if place == "reply":
        sample["reply"] = HOSTILE
    elif place == "reference":
        before["reference"] = HOSTILE
    elif place == "prompt":
        before["messages"][0]["content"] = HOSTILE
    elif place == "name":
        name = HOSTILE
    else:
        spoilt["model"] = HOSTILE
    page = Page(report.html(name, spoilt, finished.events()))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert HOSTILE in page.text


def test_a_page_without_steps_or_pairs_still_stands(made: dict[str, Any]) -> None:
    bare = copy.deepcopy(made)
    bare["eval"]["before"]["samples"] = bare["eval"]["after"]["samples"] = []
    page = Page(report.html("run", bare, []))
    assert "svg" not in [tag for tag, _ in page.tags]


def test_a_null_in_a_curve_is_left_out(made: dict[str, Any]) -> None:
    events = [
        {"kind": "step", "step": 1, "loss": None}, {"kind": "step", "step": 2, "loss": 2.0},
        {"kind": "eval", "step": 2, "heldout_loss": None},
    ]  # fmt: skip
    html = report.html("run", made, events)
    assert html.count("<circle") == 1 and "<title>2: 2.000</title>" in html


# --- the text --------------------------------------------------------------------------------


def test_markdown_has_table_and_pairs(made: dict[str, Any]) -> None:
    text = report.markdown("demo", made)
    assert text.startswith("# demo\n") and text.count("\n## Pair ") == 2
    assert "| Bits per character |" in text
    for sample in made["eval"]["before"]["samples"]:
        assert f"> {sample['reference']}" in text


def test_every_line_of_a_reply_is_quoted(made: dict[str, Any]) -> None:
    changed = copy.deepcopy(made)
    changed["eval"]["after"]["samples"][0]["reply"] = "one\n# two\n"
    changed["eval"]["before"]["samples"][0]["reply"] = ""
    text = report.markdown("demo", changed)
    assert "> one\n> # two\n" in text and "> (nothing)" in text
