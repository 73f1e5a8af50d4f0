"""The report: its JSON interface, its text and its page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import evaluated_event, step_event

from jetson_ft.errors import Message
from jetson_ft.events import Event, PauseEnded, Sensors, Step, Warned
from jetson_ft.i18n import duration
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.report import figures, summary
from jetson_ft.runs.store import Run
from jetson_ft.training.planner import Plan
from jetson_ft.training.state import TrainState

# The keys of report.json (docs/run-directory.md).
TOP = {
    "schema", "recipe_sha256", "model", "versions", "precision", "data_sha256", "seed",
    "initial_adapter", "generation", "device", "train", "plan", "eval", "data", "sensors",
    "warnings",
}  # fmt: skip
TRAIN = {
    "steps", "seconds", "rows", "tokens", "supervised_tokens", "tokens_per_second",
    "peak_memory_bytes", "energy_joules", "joules_per_token", "final_loss", "best_step",
    "stopped_early",
}  # fmt: skip
SIDE = {
    "loss", "bits_per_char", "chinese_share", "stop_rate", "repetition", "rouge_l", "chrf", "bleu",
    "distinct_1", "distinct_2", "samples",
}  # fmt: skip
COPIED = ("precision", "data_sha256", "generation", "device", "data", "eval")
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x onerror=y>&amp;'


@pytest.fixture(scope="module")
def made(finished: Run) -> dict[str, Any]:
    """report.json of a whole run."""
    report: dict[str, Any] = json.loads((finished.path / "report.json").read_text())
    return report


def test_report_has_exactly_the_documented_keys(made: dict[str, Any]) -> None:
    assert set(made) == TOP and made["schema"] == 1
    assert set(made["train"]) == TRAIN
    assert set(made["plan"]) == {"peak_memory_bytes", "seconds"}
    assert set(made["eval"]) == {
        "rows", "documents", "before", "after", "differences", "categories", "probes",
    }  # fmt: skip
    for difference in (*made["eval"]["differences"].values(), made["eval"]["probes"]["difference"]):
        assert set(difference) == {"difference", "low", "high", "clear"}
    assert set(made["eval"]["probes"]) == {
        "count", "before", "after", "lost", "gained", "difference",
    }  # fmt: skip
    speed = {"seconds", "tokens", "seconds_per_reply", "tokens_per_second"}
    assert set(made["generation"]["before"]) == set(made["generation"]["after"]) == speed
    assert set(made["eval"]["before"]) == set(made["eval"]["after"]) == SIDE
    assert made["generation"].keys() >= {"method", "max_new_tokens"}


def test_report_agrees_with_recipe_and_run(made: dict[str, Any], finished: Run) -> None:
    recipe, train = finished.recipe(), made["train"]
    assert made["recipe_sha256"] == recipe.sha256() and made["model"] == recipe.model
    assert (made["precision"], made["seed"]) == ("fp32", 0)
    assert (train["rows"], made["eval"]["rows"]) == (35, 5)
    assert train["tokens"] == made["data"]["train"]["tokens"]
    assert train["supervised_tokens"] == made["data"]["train"]["supervised_tokens"]
    assert train["energy_joules"] is None
    assert {"torch", "transformers", "peft", "jetson-ft"} <= set(made["versions"])
    assert len(made["eval"]["after"]["samples"]) == 2


def test_peak_memory_is_that_of_training(made: dict[str, Any], finished: Run) -> None:
    """The comparison after it, whose replies need a cache, doesn't count."""
    peaks = [event.memory for event in finished.events() if isinstance(event, Step)]
    assert made["train"]["peak_memory_bytes"] == max(peaks) > 50 * 2**20


def test_tokens_per_second_are_those_of_the_last_step(made: dict[str, Any], finished: Run) -> None:
    last = [event for event in finished.events() if isinstance(event, Step)][-1]
    assert made["train"]["tokens_per_second"] == pytest.approx(last.tokens_per_second, rel=1e-3)


@pytest.mark.parametrize(("steps", "expected"), [(20, 19.5), (3, 3.0), (0, None)])
def test_final_loss_is_the_mean_of_the_last_tenth(
    made: dict[str, Any], tmp_path: Path, steps: int, expected: float | None
) -> None:
    run = store.create_run(Recipe(output_dir=str(tmp_path)), "x")
    log = EventLog(run, 1)
    for step in range(1, steps + 1):
        log.emit(step_event(step, loss=float(step)))
    report = summary.build_report(
        run,
        Plan(micro_batch_tokens=0, checkpointing=False),
        TrainState(step=steps, train_seconds=2.0),
        exported_step=steps,
        **{key: made[key] for key in COPIED},
    )
    assert report["train"]["final_loss"] == expected


def test_peak_memory_is_that_of_all_attempts(made: dict[str, Any], tmp_path: Path) -> None:
    """Also of a step that a later attempt has made again in less memory."""
    run = store.create_run(Recipe(output_dir=str(tmp_path)), "resumed")
    for attempt, memory in ((1, 7 << 30), (2, 2 << 30)):
        EventLog(run, attempt).emit(step_event(1, memory=memory))
    report = summary.build_report(
        run, Plan(micro_batch_tokens=0, checkpointing=False), TrainState(), exported_step=1,
        **{key: made[key] for key in COPIED},
    )  # fmt: skip
    assert report["train"]["peak_memory_bytes"] == 7 << 30


def test_distinct_warnings_of_all_attempts_are_in_json_text_and_page(
    made: dict[str, Any], tmp_path: Path
) -> None:
    run = store.create_run(Recipe(output_dir=str(tmp_path)), "warned")
    uncovered = Message("{share:.0%} of the weights are not covered", {"share": 0.25})
    damaged = Message("{path} is damaged", {"path": "step-4"})
    for attempt, messages in ((1, [uncovered]), (2, [uncovered, damaged])):
        for message in messages:
            EventLog(run, attempt).emit(Warned.of_message(message))
    report = summary.build_report(
        run,
        Plan(micro_batch_tokens=0, checkpointing=False),
        TrainState(),
        exported_step=0,
        **{key: made[key] for key in COPIED},
    )
    assert [warning["message"] for warning in report["warnings"]] == [
        "25% of the weights are not covered", "step-4 is damaged",
    ]  # fmt: skip
    text = summary.render_markdown("demo", report)
    page = Page(summary.render_html("demo", report, []))
    for warning in report["warnings"]:
        assert text.count(warning["message"]) == 1
        assert page.text.count(warning["message"]) == 2  # in each language


def test_sources_are_listed_in_text_and_page_where_there_are_several(made: dict[str, Any]) -> None:
    assert len(made["data"]["sources"]) == 1
    assert "| source |" not in summary.render_markdown("demo", made)
    part = {"rows_read": 1234, "rows": 1000, "tokens": 56789, "heldout_rows": 0, "repeated": 0}
    several = copy.deepcopy(made)
    several["data"]["sources"] = [{"name": "a<b>.json", **part}, {"name": "c", **part}]
    text, html = summary.render_markdown("demo", several), summary.render_html("demo", several, [])
    assert "| a<b>.json | 1,234 | 1,000 | 56,789 |" in text
    assert "a&lt;b&gt;.json" in html and "56,789" in Page(html).text


def test_report_on_plain_text_has_continuations(made: dict[str, Any]) -> None:
    texts = copy.deepcopy(made)
    texts["eval"]["documents"] = texts["eval"]["rows"]
    for side in ("before", "after"):
        for sample in texts["eval"][side]["samples"]:
            sample["messages"] = [{"role": "text", "content": "从前"}]
    names = [row["name"] for row in figures.metric_rows(texts)]
    assert names[:2] == ["Loss on the texts (nats per token)", "Bits per character"]
    page = Page(summary.render_html("demo", texts, []))
    assert "Continuations side by side" in page.text and "beginning of the text" in page.text
    assert "Replies side by side" not in page.text and "The answer in the data" not in page.text
    assert "**given continuation**" in summary.render_markdown("demo", texts)


# --- sensors ------------------------------------------------------------------------------


def sampled(root: Path) -> list[Event]:
    """Return the events of a board with heat and over-current, in two attempts."""
    run = store.create_run(Recipe(output_dir=str(root)), "hot")
    first, second = EventLog(run, 1), EventLog(run, 2)
    for step, throttled, count in ((1, 0.0, 0), (2, 4.0, 3), (3, 9.0, 20)):
        first.emit(Sensors(step=step, source="sysfs", watts=20.0, temperature=98.0 + step,
                           throttled_seconds=throttled,
                           over_current={"oc1": 0, "oc3": count}))  # fmt: skip
    first.emit(PauseEnded(step=1, seconds=12.5, temperature=80.0))
    second.emit(Sensors(step=3, source="tegrastats", throttled_seconds=1.0,
                        over_current={"oc1": 1, "oc3": 5}))  # fmt: skip
    return run.events()


def test_sensors_are_summed_over_the_attempts_without_the_lost_steps(tmp_path: Path) -> None:
    assert summary.summarize_sensors(sampled(tmp_path)) == {
        "source": "tegrastats", "max_temperature": 100.0, "throttled_seconds": 5.0,
        "over_current": {"oc1": 1, "oc3": 8}, "paused_seconds": 12.5,
    }  # fmt: skip
    assert summary.summarize_sensors([step_event()]) is None


def test_heat_and_over_current_are_in_text_and_page(made: dict[str, Any], tmp_path: Path) -> None:
    hot = copy.deepcopy(made)
    hot["sensors"] = summary.summarize_sensors(sampled(tmp_path))
    hot["train"] |= {"energy_joules": 4321.0, "joules_per_token": 0.1234}
    text, page = summary.render_markdown("demo", hot), Page(summary.render_html("demo", hot, []))
    assert "4,321 J (0.123 J/token)" in text and "4,321 J" in page.text and "100 °C" in page.text
    for warning in (
        "lowered its clocks because of heat, for about 5 s", "paused for 12 s to let it cool",
        "the input voltage fell too low (oc1: 1)", "the current peaked too high (oc3: 8)",
    ):  # fmt: skip
        assert warning in text and warning in page.text


def test_warnings_are_translated_with_their_values(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = {
        "The board lowered its clocks because of heat, for about {count:,.0f} s.":
        "开发板因过热而降频约 {count:,.0f} 秒。"
    }  # fmt: skip
    monkeypatch.setattr(
        summary,
        "translator",
        lambda language: lambda text: catalogue.get(text, text) if language == "zh_CN" else text,
    )
    hot = {**made, "sensors": summary.summarize_sensors(sampled(tmp_path))}
    page = Page(summary.render_html("demo", hot, []))
    assert "因过热而降频约 5 秒" in page.text and "because of heat, for about 5 s" in page.text


def test_values_not_measured_are_left_out(made: dict[str, Any]) -> None:
    bare = copy.deepcopy(made)
    bare["sensors"] = None
    bare["train"] |= {"energy_joules": None, "joules_per_token": None}
    text, page = summary.render_markdown("demo", bare), Page(summary.render_html("demo", bare, []))
    assert "J/token" not in text + page.text and "°C" not in page.text
    assert summary.sensor_warnings(None) == []


@pytest.mark.parametrize(
    ("joules", "tokens", "expected"),
    [(100.0, 400, (100.0, 0.25)), (None, 400, (None, None)), (0.0, 0, (None, None))],
)
def test_energy_by_token(joules: Any, tokens: int, expected: Any) -> None:
    energy = summary._energy(TrainState(energy_joules=joules, tokens=tokens))
    assert tuple(energy.values()) == expected


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
    step = after - before
    interval = {"difference": step, "low": step * 0.5, "high": step * 1.5, "clear": step != 0}
    changed["eval"]["differences"][key] = interval
    (row,) = [row for row in figures.metric_rows(changed) if row["key"] == key]
    assert (row["verdict"], row["after"]) == (verdict, shown)
    assert "no clear difference" not in str(row["difference"])
    interval["clear"] = False
    (row,) = [row for row in figures.metric_rows(changed) if row["key"] == key]
    assert row["verdict"] == ("unclear" if step else "same")
    assert ("too few rows" in str(row["difference"])) == (step != 0)
    interval["low"], interval["high"] = -abs(step), 2 * abs(step)
    (row,) = [row for row in figures.metric_rows(changed) if row["key"] == key]
    assert ("no clear difference" in str(row["difference"])) == (step != 0)
    del changed["eval"]["differences"][key]
    (row,) = [row for row in figures.metric_rows(changed) if row["key"] == key]
    assert (row["verdict"], str(row["difference"])) == ("unknown", "")


@pytest.mark.parametrize(
    ("lost", "gained", "clear", "text"),
    [
        (2, 1, False, "2 of 66 answers lost, 1 gained: no clear difference."),
        (20, 1, True, "The adapter has forgotten general knowledge: 20 of 66 answers lost"),
        (1, 20, True, "20 of 66 answers gained, 1 lost."),
    ],
)
def test_what_was_forgotten_is_in_text_and_page(
    made: dict[str, Any], lost: int, gained: int, clear: bool, text: str
) -> None:
    changed = copy.deepcopy(made)
    difference = (gained - lost) / 66
    changed["eval"]["probes"] |= {
        "count": 66, "lost": ["x"] * lost, "gained": ["y"] * gained,
        "difference": {"difference": difference, "low": difference - 0.01,
                       "high": difference + 0.01, "clear": clear},
    }  # fmt: skip
    assert text in summary.render_markdown("demo", changed)
    assert text in Page(summary.render_html("demo", changed, [])).text


def test_categories_are_in_text_and_page(made: dict[str, Any]) -> None:
    changed = copy.deepcopy(made)
    interval = {"difference": -1.0, "low": -1.5, "high": -0.5, "clear": True}
    changed["eval"]["categories"] = [
        {"name": "a|<b>", "rows": 12, "before": 3.0, "after": 2.0, "difference": interval}
    ]
    row = "| a\\|<b> | 12 | 3.000 | 2.000 | -1.000 (-1.500 … -0.500) |"
    assert row in summary.render_markdown("demo", changed)
    html = summary.render_html("demo", changed, [])
    assert "a|&lt;b&gt;" in html and "-1.000 (-1.500 … -0.500)" in html


def test_reports_of_older_runs_are_shown(made: dict[str, Any]) -> None:
    old = copy.deepcopy(made)
    for key in ("differences", "categories", "probes"):
        del old["eval"][key]
    for side in ("before", "after"):
        for key in ("rouge_l", "distinct_1", "distinct_2"):
            del old["eval"][side][key]
    keys = [row["key"] for row in figures.metric_rows(old)]
    assert keys == [
        "loss", "bits_per_char", "chinese_share", "stop_rate", "repetition", "chrf", "bleu",
    ]  # fmt: skip
    assert "| chrF |" in summary.render_markdown("demo", old)
    assert "chrF" in Page(summary.render_html("demo", old, [])).text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (3600, "1 h 00 min"),
     (3721, "1 h 02 min"), (200_000, "55 h 33 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert str(duration(seconds)) == text


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


def test_page_fetches_nothing(html: str) -> None:
    assert not re.search(r"(?i)https?://|//[a-z]|@import|url\(", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert "default-src 'none'" in html


def test_page_has_curves_figures_and_pairs(html: str, made: dict[str, Any]) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 1
    assert tags.count("tr") == 1 + len(figures.METRICS)
    assert sum(a.get("class") == "card pair" for _, a in page.tags) == 2
    for sample in made["eval"]["after"]["samples"]:
        assert sample["reference"] in page.text


def test_page_has_every_text_in_every_language(html: str) -> None:
    assert html.count('<span lang="en">') == html.count('<span lang="zh-CN">') > 10


@pytest.mark.parametrize("place", ["reply", "reference", "prompt", "name", "model"])
def test_html_in_replies_and_names_is_escaped(
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
    page = Page(summary.render_html(name, spoilt, finished.events()))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert HOSTILE in page.text


def test_page_without_steps_or_pairs_is_complete(made: dict[str, Any]) -> None:
    bare = copy.deepcopy(made)
    bare["eval"]["before"]["samples"] = bare["eval"]["after"]["samples"] = []
    page = Page(summary.render_html("run", bare, []))
    assert "svg" not in [tag for tag, _ in page.tags]


def test_null_in_a_curve_is_left_out(made: dict[str, Any]) -> None:
    events = [step_event(1, loss=None), step_event(2, loss=2.0), evaluated_event(2, None)]
    html = summary.render_html("run", made, events)
    assert html.count("<circle") == 1 and "<title>2: 2.000</title>" in html


# --- the text --------------------------------------------------------------------------------


def test_markdown_has_table_and_pairs(made: dict[str, Any]) -> None:
    text = summary.render_markdown("demo", made)
    assert text.startswith("# demo\n") and text.count("\n## Pair ") == 2
    assert "| Bits per character |" in text
    for sample in made["eval"]["before"]["samples"]:
        assert f"> {sample['reference']}" in text


def test_every_line_of_a_reply_is_quoted(made: dict[str, Any]) -> None:
    changed = copy.deepcopy(made)
    changed["eval"]["after"]["samples"][0]["reply"] = "one\n# two\n"
    changed["eval"]["before"]["samples"][0]["reply"] = ""
    text = summary.render_markdown("demo", changed)
    assert "> one\n> # two\n" in text and "> (nothing)" in text
