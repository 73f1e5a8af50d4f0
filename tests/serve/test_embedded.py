"""Two adapters on the real embedded model: each answers as in the chat in fp32."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
from served_api import serve_api
from tiny_models import write_rows

from jetson_ft import adapter
from jetson_ft.chat import target
from jetson_ft.inference.generate import Sampling
from jetson_ft.models import files, loading
from jetson_ft.models.loading import WeightFormat
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.runs.store import Run
from jetson_ft.serve import models
from jetson_ft.serve.engine import Engine
from jetson_ft.serve.models import EngineSettings

QUESTIONS = ("What is the capital of France?", "Name three colours.")


def make_adapter_run(root: Path, label: str, seed: int, report: Path) -> Run:
    """Make a finished run of the embedded model with a random adapter."""
    import torch

    rows = root / "rows.json"
    if not rows.exists():
        write_rows(rows)
    recipe = Recipe.model_validate(
        {"model": "embedded", "precision": "fp32", "output_dir": str(root),
         "lora": {"rank": 4, "rslora": True},
         "data": {"train": str(rows), "heldout": 2}}
    )  # fmt: skip
    base = files.resolve_model("embedded")
    run = store.create_run(recipe, label)
    model = loading.load_model(base, WeightFormat("fp32"), "cpu")
    model = adapter.attach_adapter(model, recipe.lora, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    run.adapter.mkdir()
    adapter.save_adapter(model, loading.load_tokenizer(base), base, run.adapter)
    shutil.copy(report, run.path / "report.json")  # for the export's card
    run.write_state("finished")
    return run


@pytest.mark.slow(minutes=1.5)
def test_two_adapters_on_the_embedded_model_answer_as_in_the_chat(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Exports are checked in tests/export.
    unchecked = functools.partial(models.exports.make_export, check=False)
    monkeypatch.setattr(models.exports, "make_export", unchecked)
    report = finished.path / "report.json"
    runs = [
        make_adapter_run(tmp_path, label, seed, report) for seed, label in enumerate(("one", "two"))
    ]
    lines: list[str] = []
    settings = EngineSettings(context=512)
    serving = models.prepare([run.name for run in runs], tmp_path, settings, lines.append)
    engine = Engine(serving.process, lambda: False, lambda: True, lambda: None)
    greedy = {"max_tokens": 12, "temperature": 0, "extra_body": {"repetition_penalty": 1.0}}
    with serve_api(engine, serving.models, context=serving.context) as served:
        names = ["one", "two", "base"]
        texts = {
            (name, question): served.chat(name, question, **greedy)
            for question in QUESTIONS for name in names
        }  # fmt: skip
    for label, run in zip(names, runs, strict=False):
        session = target.open_session(target.resolve_target(run.name, tmp_path))
        for question in QUESTIONS:
            for name, use_adapter in ((label, True), ("base", False)):
                sampling = Sampling(12, repetition_penalty=1.0)
                expected = "".join(session.reply(question, sampling, use_adapter))
                assert texts[name, question] == expected
    assert len({texts[name, QUESTIONS[0]] for name in names}) > 1
    again = models.prepare([run.name for run in runs], tmp_path, settings, lines.append)
    assert len(lines) == len(set(lines)) and again.models == serving.models  # nothing made twice
