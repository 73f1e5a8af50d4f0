"""What is printed to a terminal: any text as it is."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jetson_ft.cli import output

TEXT = "a :smile: [red]b[/red] [/x] \x1b[2Jc"
SHOWN = "a :smile: [red]b[/red] [/x] \\x1b[2Jc"


def test_shown_text_has_no_markup_and_no_emoji_codes(capsys: pytest.CaptureFixture[str]) -> None:
    output.show(TEXT)
    output.show(TEXT, style="bold")
    assert capsys.readouterr().out == f"{SHOWN}\n" * 2


def test_bar_shows_names_and_notes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    options: dict[str, Any] = {"force_terminal": True, "color_system": None, "width": 200}
    monkeypatch.setattr(output, "out", Console(file=file, **options))
    bar = output.ProgressBar()
    with bar:
        bar.show(TEXT, 1, 2, note=TEXT)
        bar.show(TEXT, 2, 2, note=TEXT)
        assert len(bar.tasks) == 1, "the same bar"
        bar.refresh()
    assert file.getvalue().count(SHOWN) >= 2
