"""From the shipped recipe to a client of the API, by the commands of the README."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from few_probes import IN_CHILDREN
from huggingface_hub import ModelCard
from openai import OpenAI
from workbench import change_children

# The quickstart, but shorter: steps, rows and replies.
SETTINGS = (
    "train.max_minutes=null", "train.max_steps=4", "train.tokens_per_step=128",
    "data.heldout=8", "eval.max_new_tokens=4", "eval.samples=2",
)  # fmt: skip


@pytest.mark.slow(minutes=4)
def test_from_the_quickstart_to_a_client_of_the_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tmp_path, "quickstart-zh")
    change_children(IN_CHILDREN, tmp_path, monkeypatch, own_cache=False)
    second = train(tmp_path, "--fork", first.name, "--set", "train.seed=1")

    jetson_ft(tmp_path, "eval", first.name, "--output", "eval.json")
    measured = json.loads((tmp_path / "eval.json").read_text())["eval"]
    report = json.loads((first / "report.json").read_text())["eval"]
    for side in ("before", "after"):  # bf16 rounds with other packs
        assert measured[side]["bits_per_char"] == pytest.approx(report[side]["bits_per_char"], 0.01)
    assert "probes" in report

    jetson_ft(tmp_path, "compare", first.name, second.name, "--html", "both.html")
    html = (tmp_path / "both.html").read_text()
    for run in (first, second):  # by its label, without the time
        assert f'<th scope="col">{run.name[16:]}</th>' in html
    assert "train.seed" in html

    made = json.loads(jetson_ft(tmp_path, "export", first.name, "--format", "gguf", "--json"))
    (export,) = made["exports"]
    folder, check = Path(export["path"]), export["check"]
    assert check["passed"] and check["prompts"] == check["same_tokens"] == 8
    assert check["same_text"] + check["near_ties"] == 8
    bits = check["bits_per_character"]
    assert bits["export"] == pytest.approx(bits["adapter"], rel=check["bound"])
    modelfile = (folder / "Modelfile").read_text()
    (gguf,) = folder.glob("*.gguf")
    assert f"FROM ./{gguf.name}" in modelfile and "PARAMETER stop" in modelfile

    with served(tmp_path, first.name) as api:
        client = OpenAI(base_url=api["url"], api_key=api["api_key"] or "none")
        names = [model.id for model in client.models.list()]
        assert first.name in names and "base" in names
        question: Any = [{"role": "user", "content": "法国的首都是哪里？"}]
        whole = client.chat.completions.create(model=first.name, messages=question, max_tokens=8)
        stream = client.chat.completions.create(
            model=first.name, messages=question, max_tokens=8, stream=True
        )
        text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
        assert text and text == whole.choices[0].message.content

    for card_folder, relation in ((first / "adapter", "adapter"), (folder, "finetune")):
        card = ModelCard.load(card_folder / "README.md")
        assert card.data.base_model_relation == relation  # type: ignore[attr-defined]
        assert "llama.cpp" in card.content or relation == "adapter"


def train(folder: Path, *arguments: str) -> Path:
    """Train the short quickstart, or a fork of it; return the run's folder."""
    sets = SETTINGS if "--fork" not in arguments else ()
    before = {*folder.glob("runs/*")}
    jetson_ft(folder, "train", *arguments, *(word for text in sets for word in ("--set", text)))
    (run,) = {path for path in folder.glob("runs/*") if (path / "report.json").exists()} - before
    return run


def jetson_ft(folder: Path, *arguments: str) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jetson_ft.cli", *arguments]


@contextmanager
def served(folder: Path, run: str) -> Iterator[dict[str, Any]]:
    """Serve a run; yield what the server prints once it is ready."""
    server = subprocess.Popen(
        command("serve", run, "--port", "0", "--json", "--context", "512"),
        cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stdout
        yield json.loads(server.stdout.readline())
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
