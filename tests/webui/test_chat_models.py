"""The models that the chat tab offers, their names, and the questions to begin with."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest
from run_folders import copy_finished, make_run

from jetson_ft.errors import UserError
from jetson_ft.runs.store import Run
from jetson_ft.webui.allowed_paths import AllowedPaths
from jetson_ft.webui.render import Locale
from jetson_ft.webui.tabs.chat_models import BASE, NONE, OWN_BASE, ChatModels

EMBEDDED = "SmolLM2-135M-Instruct (base)"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a finished run with exports; llama.cpp's adapter is no model by itself."""
    run = copy_finished(tmp_path, "20260101-000000-one")
    (run.path / "about.json").write_text('{"title": "One"}')
    start_at(run, datetime(2020, 1, 2, 12, 8).timestamp())
    for name, kind in (("merged", "merged"), ("gguf-q8_0", "gguf"), ("lora", "lora")):
        folder = run.path / "export" / name
        folder.mkdir(parents=True)
        suffix = "safetensors" if kind == "merged" else "gguf"
        (folder / f"one.{suffix}").write_bytes(b"")
        (folder / "config.json").write_text("{}")
        export = {
            "schema": 1, "kind": kind, "name": name, "created": "", "run": run.name, "base": {},
            "adapter": {"sha256": ""}, "merge": {}, "versions": {}, "files": [],
        }  # fmt: skip
        (folder / "export.json").write_text(json.dumps(export))
        (folder / "check.json").write_text("{}")
    return run


def start_at(run: Run, created: float) -> None:
    state = json.loads((run.path / "state.json").read_bytes())
    (run.path / "state.json").write_text(json.dumps(state | {"created": created}))


def models(root: Path, **options: AllowedPaths) -> ChatModels:
    return ChatModels(Locale("en"), root, **options)


def compared_choices(root: Path, first: str) -> list[tuple[str, str]]:
    chat = models(root)
    return chat.compared_choices(first, chat.choices())


def test_adapters_exports_and_bases_are_offered_by_name(run: Run, tmp_path: Path) -> None:
    choices = models(tmp_path).choices()
    gguf, merged = run.path / "export/gguf-q8_0/one.gguf", run.path / "export/merged"
    one = "One · Jan 2, 2020 12:08"
    assert choices[:4] == [
        (one, run.name), (f"{one} · GGUF q8_0", str(gguf)),
        (f"{one} · Merged model", str(merged)), (EMBEDDED, BASE),
    ]  # fmt: skip
    for label, name in choices:
        assert models(tmp_path).title(name) == label


def test_a_run_of_today_has_its_time_and_its_label_in_the_place_of_a_name(
    run: Run, tmp_path: Path
) -> None:
    (run.path / "about.json").unlink()
    start_at(run, now := time.time())
    assert models(tmp_path).title(run.name) == f"one · {datetime.fromtimestamp(now):%H:%M}"
    (run.path / "state.json").write_text("{")
    assert models(tmp_path).title(run.name) == "one"


def test_a_comparison_offers_the_own_base_and_no_model_twice(run: Run, tmp_path: Path) -> None:
    compared = compared_choices(tmp_path, run.name)
    assert compared[0] == ("no comparison", NONE)
    assert compared[1][1] == OWN_BASE and compared[1][0].endswith("(base)")
    assert run.name not in [name for _label, name in compared]
    (run.path / "recipe.yaml").write_text("version: 1\nmodel: embedded\n")
    compared = compared_choices(tmp_path, run.name)
    assert compared[1] == (EMBEDDED, OWN_BASE) and BASE not in [name for _label, name in compared]
    assert OWN_BASE not in [name for _label, name in compared_choices(tmp_path, BASE)]


def test_titles_name_the_model(run: Run, tmp_path: Path) -> None:
    title = models(tmp_path).title
    assert title(BASE) == title("embedded") == EMBEDDED
    assert title("owner/name") == "owner/name (base)"
    assert title("/some/where/model") == "model"
    assert title(OWN_BASE, "nothing") == "Its base model"
    assert title(NONE) == ""


def test_questions_to_begin_with_are_held_out_rows(run: Run, tmp_path: Path) -> None:
    samples = run.report()["eval"]["after"]["samples"]
    asked = [sample["messages"][0]["content"] for sample in samples]
    for name in (run.name, str(run.path / "export/gguf-q8_0/one.gguf")):
        starters = models(tmp_path).starters(name)
        assert starters and set(starters) <= set(asked)
    bundled = models(tmp_path).starters(BASE)
    assert len(bundled) == 3 and not set(bundled) & set(asked)
    make_run(tmp_path, "20260102-000000-two").adapter.mkdir()
    assert models(tmp_path).starters("20260102-000000-two") == bundled, "it has no report"


def test_two_bases_take_turns(run: Run, tmp_path: Path) -> None:
    other = copy_finished(tmp_path, "20260102-000000-two")
    chat = models(tmp_path)
    assert not chat.are_alternating(run.name, other.name)
    assert not chat.are_alternating(run.name, OWN_BASE)
    assert not chat.are_alternating(run.name, NONE)
    assert chat.are_alternating(run.name, BASE)
    assert not chat.are_alternating("nothing", BASE)


def test_paths_outside_the_allowed_folders_are_refused(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (tmp_path / "runs").mkdir()
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    chat = models(tmp_path, allowed=AllowedPaths((tmp_path / "runs",)))
    with pytest.raises(UserError, match="may not name files"):
        chat.require(str(secret))
    assert chat.title(str(secret)) == "secret"
    assert chat.require(run.name) == run.name
    (secret / "rows.jsonl").write_text("")
    (run.path / "recipe.yaml").write_text(f"version: 1\ndata: {{train: {secret}/rows.jsonl}}\n")
    with pytest.raises(UserError, match="may not name files"):
        chat.require_data(run.name)
