"""What would be published: which files, with which content; the sending is in tests/cli."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import copy_finished

from jetson_ft import hub
from jetson_ft.errors import UserError
from jetson_ft.hub import UploadTarget
from jetson_ft.runs import push
from jetson_ft.runs.locks import lock
from jetson_ft.runs.report import card
from jetson_ft.runs.store import Run

SENT = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json",
    "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return copy_finished(tmp_path)


@pytest.fixture(autouse=True)
def own_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new repository: the Hub isn't asked here."""
    monkeypatch.setattr(hub, "upload_target", lambda repo: UploadTarget(repo, "owner", None))


def text_of(plan: push.PushPlan, name: str) -> str:
    content = plan.files[name]
    return content.decode() if isinstance(content, bytes) else content.read_text()


def make_export(run: Run, name: str, **files: str) -> Path:
    folder = run.path / "export" / name
    folder.mkdir(parents=True)
    kind = name.partition("-")[0]
    export = {"schema": 1, "kind": kind, "name": name, "base": {"name": "/home/x/models/own"}}
    for file, content in {"export.json": json.dumps(export), "README.md": "# x\n", **files}.items():
        (folder / file).write_text(content)
    return folder


def test_only_files_of_known_names_are_sent(run: Run) -> None:
    unknown = ["log.txt", "events.jsonl", "optimizer.bin", "run.py", ".env", "x.pt", "state.json"]
    for name in unknown:
        (run.adapter / name).write_text("secret")
    (run.adapter / "more.safetensors").symlink_to("/etc/passwd")
    (run.adapter / "folder.safetensors").mkdir()
    plan = push.plan_push(run, "owner/new")
    assert sorted(plan.files) == SENT
    assert sorted(plan.left_out) == sorted([*unknown, "more.safetensors", "folder.safetensors"])
    assert plan.private and plan.what == "adapter" and plan.address.endswith("/owner/new")
    assert (
        plan.sizes()["adapter_model.safetensors"]
        == plan.files["adapter_model.safetensors"].stat().st_size
    )  # type: ignore[union-attr]


def test_names_stand_in_the_place_of_paths(run: Run) -> None:
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    folder = "/home/someone/models/own"
    changed = {**config, "base_model_name_or_path": folder, "eva_config": {"a": [f"{folder}/x y"]}}
    (run.adapter / "adapter_config.json").write_text(json.dumps(changed))
    (run.path / "recipe.yaml").write_text(f"version: 1\nmodel: {folder}\n")
    plan = push.plan_push(run, "owner/new")
    sent = json.loads(text_of(plan, "adapter_config.json"))
    assert sent == {**config, "base_model_name_or_path": "own", "eva_config": {"a": ["x y"]}}
    stored = json.loads((run.adapter / "base.json").read_text())
    expected = {"name": "own", "fingerprint": stored["fingerprint"]}
    assert json.loads(text_of(plan, "base.json")) == expected
    for name in plan.files:
        if name.endswith((".json", ".md")):
            assert stored["folder"] not in text_of(plan, name)


@pytest.mark.parametrize(
    ("model", "in_config", "in_base"),
    [
        ("o/n", "o/n", "o/n"),
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct", "embedded"),
    ],
)
def test_the_base_is_named_as_the_hub_and_the_program_know_it(
    run: Run, model: str, in_config: str, in_base: str
) -> None:
    (run.path / "recipe.yaml").write_text(f"version: 1\nmodel: {model}\n")
    plan = push.plan_push(run, "owner/new")
    config = json.loads(text_of(plan, "adapter_config.json"))
    assert config["base_model_name_or_path"] == in_config
    assert json.loads(text_of(plan, "base.json"))["name"] == in_base


def test_pefts_empty_card_is_replaced_and_a_persons_card_is_sent(run: Run) -> None:
    plan = push.plan_push(run, "owner/new")
    assert text_of(plan, "README.md") == card.model_card(run) and plan.quotes_rows
    (run.adapter / "README.md").write_text("# Mine\n")
    plan = push.plan_push(run, "owner/new")
    assert text_of(plan, "README.md") == "# Mine\n" and not plan.quotes_rows


@pytest.mark.parametrize("where", ["run", "home", "base"])
def test_a_card_that_names_a_folder_of_this_machine_is_refused(run: Run, where: str) -> None:
    base = json.loads((run.adapter / "base.json").read_text())["folder"]
    path = {"run": str(run.path), "home": f"{Path.home()}/rows.json", "base": base}[where]
    (run.adapter / "README.md").write_text(f"# Trained on {path}\n")
    with pytest.raises(UserError, match="names a folder of this machine") as caught:
        push.plan_push(run, "owner/new")
    assert str(caught.value.where) == str(run.adapter / "README.md")


def test_exports_are_named_by_name_or_kind(run: Run) -> None:
    with pytest.raises(UserError, match="has no export 'gguf'"):
        push.plan_push(run, "owner/new", "gguf")
    make_export(run, "gguf-f16", **{"x-f16.gguf": "GGUF", "Modelfile": "FROM ./x-f16.gguf\n"})
    make_export(run, "merged", **{"model-00001-of-00002.safetensors": "", "config.json": "{}"})
    plan = push.plan_push(run, "owner/new", "gguf")
    assert sorted(plan.files) == ["Modelfile", "README.md", "export.json", "x-f16.gguf"]
    assert json.loads(text_of(plan, "export.json"))["base"] == {"name": "own"}
    make_export(run, "gguf-q8_0")
    with pytest.raises(UserError, match=r"several(?s:.*)gguf-f16, gguf-q8_0"):
        push.plan_push(run, "owner/new", "gguf")
    assert push.plan_push(run, "owner/new", "gguf-q8_0").what == "gguf-q8_0"
    assert "config.json" in push.plan_push(run, "owner/new", "merged").files


@pytest.mark.parametrize("name", ["../../other", ".", "", "..", ".gguf-f16.tmp"])
def test_other_folders_are_no_exports(run: Run, name: str) -> None:
    make_export(run, ".gguf-f16.tmp")
    with pytest.raises(UserError, match="has no export"):
        push.plan_push(run, "owner/new", name)


def test_an_unfinished_run_is_refused(run: Run) -> None:
    (run.adapter / "README.md").write_text("# Mine\n")
    (run.path / "worker.lock").touch()
    held = lock(run.path / "worker.lock")
    assert held
    with held, pytest.raises(UserError, match="is running"):
        push.plan_push(run, "owner/new")
    (run.path / "report.json").unlink()
    with pytest.raises(UserError, match="before its report was written"):
        push.plan_push(run, "owner/new")
    (run.adapter).rename(run.path / "x")
    with pytest.raises(UserError, match="has no adapter yet"):
        push.plan_push(run, "owner/new")


@pytest.mark.parametrize(
    ("exists_private", "public", "private"),
    [(None, False, True), (None, True, False), (True, True, True), (True, False, True),
     (False, True, False)],
)  # fmt: skip
def test_a_repository_is_private_unless_asked(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    exists_private: bool | None,
    public: bool,
    private: bool,
) -> None:
    target = UploadTarget("owner/old", "owner", exists_private)
    monkeypatch.setattr(hub, "upload_target", lambda _repo: target)
    assert push.plan_push(run, "owner/old", public=public).private is private


def test_a_public_repository_is_refused_unless_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = UploadTarget("owner/old", "owner", False)
    monkeypatch.setattr(hub, "upload_target", lambda _repo: target)
    with pytest.raises(UserError, match="exists and is public"):
        push.plan_push(run, "owner/old")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(json_values, st.lists(st.text("ab ./~", min_size=1), min_size=1))
def test_no_path_is_left_in_settings(value: Any, parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    sent = push._without_paths({"x": [value, path, {"y": path}]})
    assert sent["x"][1] == sent["x"][2]["y"]
    assert "/" not in sent["x"][1] or path.count("/") == 1
    assert push._without_paths("a chat\n/template/of lines") == "a chat\n/template/of lines"
