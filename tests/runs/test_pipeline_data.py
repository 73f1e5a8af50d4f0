"""Whole runs on several sources, on plain text, and with a chat template of the recipe."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from jetson_ft.chat.target import open_session, resolve_target
from jetson_ft.events import Failed, Warned
from jetson_ft.hardware.detect import Device
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.runs.evaluate import evaluate_model
from jetson_ft.runs.store import Run


def run_on(workbench: Any, data: dict[str, Any], label: str, **train: Any) -> Run:
    """Return a queued run on these rows."""
    recipe = workbench.run("unused", **train).recipe()
    values = recipe.model_dump()
    values["data"] |= {"heldout": "auto"} | data
    run = store.create_run(Recipe.model_validate(values), label)
    run.write_state("queued")
    return run


@pytest.mark.slow
def test_several_sources_with_shares_are_trained_on_reported_and_resumed(
    workbench: Any, rows_file: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.jsonl"
    rows = [{"question": f"问{n}", "answer": f"答{n}"} for n in range(30)]
    more.write_text("\n".join(map(json.dumps, rows)))
    train = [{"source": str(rows_file), "share": 0.5}, str(more)]
    run = run_on(workbench, {"train": train}, "mixture")
    assert workbench.work(run, "step-2") == -signal.SIGKILL
    assert workbench.work(run) == 0, (run.path / "log.txt").read_text()
    report = json.loads((run.path / "report.json").read_text())
    parts = report["data"]["sources"]
    assert [part["name"] for part in parts] == [str(rows_file), str(more)]
    assert [(part["rows_read"], part["rows"], part["heldout_rows"]) for part in parts] == [
        (40, 18, 2), (30, 27, 3),
    ]  # fmt: skip
    assert sum(part["tokens"] for part in parts) == report["data"]["train"]["tokens"]
    assert f"| {more} | 30 | 27 |" in (run.path / "report.md").read_text()
    assert "数据来源" in (run.path / "report.html").read_text()
    again = run_on(workbench, {"train": train}, "again")
    assert workbench.work(again) == 0
    ours, theirs = (one.adapter / "adapter_model.safetensors" for one in (run, again))
    assert ours.read_bytes() == theirs.read_bytes()
    more.write_text(more.read_text() + "\n" + json.dumps({"question": "q", "answer": "a"}))
    changed = run_on(workbench, {"train": train}, "changed")
    shutil.copy(run.path / "data.json", changed.path)
    record = json.loads((changed.path / "data.json").read_text())
    record["recipe"] = changed.recipe().model_dump()
    (changed.path / "data.json").write_text(json.dumps(record))
    assert workbench.work(changed) != 0
    (failed,) = (event for event in changed.events() if isinstance(event, Failed))
    assert failed.what == "The data has changed since this run began."


@pytest.mark.slow
def test_plain_text_is_trained_on_compared_evaluated_and_chatted_with(
    workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "precision", lambda self, wanted: "fp32")
    rows = [{"content": f"第{n}段。江面很宽，船很慢。" * (1 + n % 5)} for n in range(30)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(corpus), "format": "text", "max_length": 64}
    run = run_on(workbench, data, "corpus", max_steps=6)
    assert workbench.work(run) == 0, (run.path / "log.txt").read_text()
    report = json.loads((run.path / "report.json").read_text())
    assert report["eval"]["documents"] == report["eval"]["rows"] == 3
    assert report["data"]["train"]["split"] > 0
    assert report["eval"]["after"]["bits_per_char"] < report["eval"]["before"]["bits_per_char"]
    (sample, *_others) = report["eval"]["after"]["samples"]
    (beginning,) = sample["messages"]
    assert beginning["role"] == "text" and beginning["content"] and sample["reference"]
    assert rows[27]["content"].startswith(beginning["content"].rstrip("\ufffd"))
    page = (run.path / "report.html").read_text()
    assert "Continuations side by side" in page and "数据中的后文" in page
    assert "Replies side by side" not in page and "Loss on the answers" not in page
    assert "given continuation" in (run.path / "report.md").read_text()
    run.write_state("finished")
    for rows_of, count in ((None, 3), (str(corpus), 30)):
        again = evaluate_model(run.recipe(), run.adapter, rows_of, lambda *_: None)["eval"]
        assert (again["documents"], again["rows"]) == (count, count)
    chat = open_session(resolve_target(str(run.path), tmp_path))
    assert chat.messages("q")[-1] == {"role": "user", "content": "q"}


def test_chat_template_of_the_recipe_is_saved_and_used_to_evaluate_and_chat(
    workbench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "precision", lambda self, wanted: "fp32")
    template = tmp_path / "mine.jinja"
    template.write_text(  # rewrites earlier answers, and leaves system messages out
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + '> ' }}"
        "{% if m['role'] == 'user' or loop.last %}{{ m['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
    )
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "<|endoftext|>")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in [*turns, ("assistant", f"{n}")]]}
        for n in range(12)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = workbench.run("unused", tmp_path / "rows.json", max_steps=2).recipe()
    recipe.data.chat_template = str(template)
    run = store.create_run(recipe, "template")
    run.write_state("queued")
    assert workbench.work(run) == 0, (run.path / "log.txt").read_text()
    report = json.loads((run.path / "report.json").read_text())
    assert report["data"]["train"]["context_answers"] == 7
    assert report["data"]["train"]["systems_dropped"] == 7
    assert report["data"]["train"]["control_texts"] == 7
    warned = [event.message for event in run.events() if isinstance(event, Warned)]
    assert len(warned) == 6 and all(text.startswith("Held-out rows: ") for text in warned[3:])
    assert "7 answers are read but not trained on" in (run.path / "report.md").read_text()
    assert "有 7 个回答只作上文" in (run.path / "report.html").read_text()
    template.unlink()
    run.write_state("finished")
    again = evaluate_model(run.recipe(), run.adapter, None, lambda *_: None)["eval"]
    assert again["before"]["loss"] == pytest.approx(report["eval"]["before"]["loss"], rel=1e-4)
    chat = open_session(resolve_target(str(run.path), tmp_path))
    prompt = chat.tokenizer.apply_chat_template(chat.messages("q"), tokenize=False)
    assert prompt == "user> q<|endoftext|>"
