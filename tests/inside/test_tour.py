"""docs/inside.md: its pictures are there, small, and of commands that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from script_modules import load_script

from jetson_ft.cli.app import app
from jetson_ft.inside.texts import view_texts

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script() -> Any:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    return load_script("picture_inside")


def test_each_picture_is_of_a_file_that_a_command_of_the_page_writes(script: Any) -> None:
    written = {words[-1].removesuffix(".html") for words in script.commands()}
    shown = set(re.findall(r"images/inside-([\w-]+)\.png", (DOCS / "inside.md").read_text("utf-8")))
    assert shown == set(script.PICTURES)
    texts = list(view_texts(str).values())
    for name, (file, heading, first, last) in script.PICTURES.items():
        assert file in written and heading in texts
        assert any(text.startswith(first) for text in texts) and (last or first)
        assert 0 < (DOCS / "images" / f"inside-{name}.png").stat().st_size <= script.MAX_BYTES


def test_each_command_of_the_page_exists_with_its_options() -> None:
    """Also those within sentences."""
    import typer

    text = (DOCS / "inside.md").read_text("utf-8")
    commands = re.findall(r"^jetson-ft .+$|(?<=`)jetson-ft [^`]+(?=`)", text, re.MULTILINE)
    assert "jetson-ft compare RUN RUN" in commands and len(commands) > 10
    for line in commands:
        command: Any = typer.main.get_command(app)
        name, *words = shlex.split(line)
        while words and hasattr(command, "commands"):
            name = words.pop(0)
            command = command.commands[name]
        if not hasattr(command, "commands"):  # of a group alone, the page names no options
            command.make_context(name, words)
