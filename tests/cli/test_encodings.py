"""Terminals that aren't UTF-8, and input with damaged bytes: replaced, never an exception."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jetson_ft import cli
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store

ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "no locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
}
ROWS = '{"instruction": "你好——🙂", "output": "\u2028好é"}\n' * 3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with rows and a run, as the current one."""
    (tmp_path / "行.jsonl").write_text(ROWS, encoding="utf-8")
    run = store.create_run(Recipe(output_dir=str(tmp_path / "runs")), "x")
    run.write_state("queued")
    (run.path / "about.json").write_text('{"title": "标题 ✓", "notes": "é"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(arguments: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the program in this process with streams of that encoding; return its output."""
    output, errors = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding=encoding))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["jetson-ft", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        assert end.code in (0, 2, None), errors.getvalue()
    sys.stdout.flush()
    sys.stderr.flush()
    text = errors.getvalue().decode(encoding, "replace")  # typer writes UTF-8 itself
    assert "Traceback" not in text and "A fault in this program" not in text
    return output.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["train", "--help"], ["doctor"], ["models"], ["recipe", "list"],
        ["recipe", "show", "quickstart-zh"], ["runs", "list"], ["runs", "show"],
        ["data", "inspect", "行.jsonl"], ["plan", "quickstart-zh", "--device", "orin-nx-16gb"],
        ["train", "没有.yaml"], ["chat", "没有"], ["没有"], ["data", "inspect", "没有"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.usefixtures("here")
def test_commands_print_what_an_encoding_has(
    arguments: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch, tiny_phi: Path
) -> None:
    if "行.jsonl" in arguments:
        arguments = [*arguments, "--model", str(tiny_phi)]
    run_here(arguments, encoding, monkeypatch)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-8"])
@pytest.mark.usefixtures("here")
def test_json_is_the_same_in_every_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tiny_phi: Path
) -> None:
    arguments = ["data", "inspect", "--json", "行.jsonl", "--model", str(tiny_phi)]
    shown = json.loads(run_here(arguments, encoding, monkeypatch))
    texts = ["".join(text for text, _trained in row) for row in shown["previews"]]
    assert len(texts) == 3 and all("你好——🙂" in text and "\u2028好é" in text for text in texts)
    assert shown["read"]["files"][0]["path"] == "行.jsonl"


def program(arguments: list[str], text: bytes, environment: str, folder: Path) -> Any:
    removed = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG", "LC_CTYPE")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return subprocess.run(
        [sys.executable, "-m", "jetson_ft.cli", *arguments],
        input=text,
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1", **ENVIRONMENTS[environment]},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_chat_goes_on_after_damaged_bytes(here: Path, environment: str, tiny_phi: Path) -> None:
    lines = [
        b"\xff\xfe\x80 hi", "你好".encode(), b"/system \xe4\xbd", b"/examples \xff",
        b"/examples a\x00b", b"/set top_k \xff", b"/\xff", b"\xc3", b"/set top_k 3", b"bye",
    ]  # fmt: skip
    arguments = ["chat", "base", "--model", str(tiny_phi), "--max-new-tokens", "4"]
    done = program(arguments, b"\n".join(lines) + b"\n", environment, here)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    text = done.stdout.decode(errors="strict" if environment != "latin-1" else "replace")
    assert text.count(" tokens/s)") == 4, "the lines that are no commands are answered"
    assert text.count("not found") == 2 and "Unknown command /" in text
    assert text.rindex("top_k = 3") < text.rindex("model> ")


@pytest.mark.parametrize("arguments", [["recipe", "list"], ["data", "inspect", "行.jsonl"]])
def test_other_commands_print_without_a_locale(
    here: Path, arguments: list[str], tiny_phi: Path
) -> None:
    more = ["--model", str(tiny_phi)] if "inspect" in arguments else []
    done = program([*arguments, *more], b"", "no locale", here)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stdout.isascii() and b"Traceback" not in done.stderr
