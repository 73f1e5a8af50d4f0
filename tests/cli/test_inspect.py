"""`jetson-ft inspect`: in the terminal, as JSON, as a page; errors as everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import assert_refused, invoke, main_here
from run_folders import copy_finished

from jetson_ft.runs.store import Run

VERSION = Path(__file__).parents[1] / "versions" / "1"
VIEWS = {
    "tokens": ("tokens",),
    "attention": ("attention", "attention_example"),
    "next": ("next_token",),
    "reply": ("reply",),
    "in-context": ("in_context",),
    "numbers": ("numbers", "quantization"),
}


@pytest.mark.parametrize("command", VIEWS)
def test_view_is_printed_as_text_as_json_and_written_as_page(
    command: str, tiny_phi: Path, tmp_path: Path
) -> None:
    text = [] if command == "numbers" else ["一只猫"]
    arguments = ["inspect", command, tiny_phi, *text]
    html = tmp_path / "view.html"
    printed = json.loads(invoke(*arguments, "--json", "--html", html))
    assert printed["schema"] == 1 and printed["model"] == str(tiny_phi)
    assert tuple(printed["views"]) == VIEWS[command]
    page = html.read_text("utf-8")
    assert all(f'"{view}":' in page for view in VIEWS[command])
    assert len(invoke(*arguments).splitlines()) > 3


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a finished run, whose recipe names its base as `model`, in the current folder."""
    (tmp_path / "model").symlink_to(VERSION / "model")
    monkeypatch.chdir(tmp_path)
    return copy_finished(tmp_path / "runs", "20260101-000000-finished")


@pytest.mark.parametrize("command", [*VIEWS, "adapter"])
def test_view_of_a_run_has_both_sides(command: str, run: Run, tmp_path: Path) -> None:
    text = [] if command in ("numbers", "adapter") else ["一只猫"]
    html = tmp_path / "view.html"
    data = json.loads(invoke("inspect", command, run.name, *text, "--json", "--html", html))
    title = "model" if command == "numbers" else f"model with {run.name}"
    assert data["model"] == title
    assert tuple(data["views"]) == VIEWS.get(command, ("adapter",))
    for view in data["views"].values():
        sides = view.get("sides") or view.get("nats")
        assert sides is None or list(sides) == ["base", "adapter"]
    page = html.read_text("utf-8")
    assert title in page and all(f'"{view}":' in page for view in data["views"])
    printed = invoke("inspect", command, "latest", *text)
    assert printed.splitlines()[0] == title
    if "sides" in next(iter(data["views"].values())):
        assert "base" in printed and "adapter" in printed


def test_tokens_of_an_answer_say_what_is_trained_on(tiny_phi: Path) -> None:
    output = invoke("inspect", "tokens", tiny_phi, "猫", "--answer", "是")
    assert "context" in output and "answer" in output
    assert "猫 = bytes e7 8c ab in the tokens <e7>, <8c>, <ab>" in output


def test_sampling_and_the_matrix_can_be_chosen(tiny_phi: Path) -> None:
    options = ("--temperature", "0.5", "--top-k", "3", "--top", "9", "--json")
    data = json.loads(invoke("inspect", "next", tiny_phi, "a", *options))["views"]["next_token"]
    steps = {step["name"]: step["kept"] for step in data["sides"]["base"]["steps"]}
    assert list(steps) == ["model", "temperature", "top_k", "top_p"] and steps["top_k"] == 3
    matrix = "model.layers.1.mlp.fc1"
    data = json.loads(invoke("inspect", "numbers", tiny_phi, "--matrix", matrix, "--json"))
    assert data["views"]["quantization"]["path"] == matrix


def test_known_model_that_is_not_here_has_its_numbers_without_a_download() -> None:
    output = invoke("inspect", "numbers", "Qwen/Qwen3-0.6B")
    assert "596,049,920 parameters" in output and "nf4" in output


def test_errors_are_messages(tiny_phi: Path, tmp_path: Path) -> None:
    done = main_here("inspect", "numbers", str(tiny_phi), "--matrix", "model.layers.7.mlp.fc1")
    assert_refused(done, "no quantized layer model.layers.7.mlp.fc1", "model.layers.0.")
    done = main_here("inspect", "adapter", str(tiny_phi), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["what"] == "The model has no adapter."
    done = main_here("inspect", "in-context", str(tiny_phi), "--examples", "gone", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["where"] == "gone"
    done = main_here("inspect", "tokens", str(tiny_phi), "a", "--html", str(tmp_path / "no" / "x"))
    assert done.returncode == 2 and not (tmp_path / "no").exists()
