"""Progress lines of a comparison."""

from __future__ import annotations

import pytest

from jetson_ft.cli import evaluate


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_each_part_has_a_first_and_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with evaluate.comparison_bar() as progress:
        for side in ("before", "after"):
            for part in ("tokens", "replies"):
                for done in (0, 0, 8, 16, 20):
                    progress(side, part, done, 20)
    assert lines(capsys) == [
        "loading the model",
        "measuring the base", "measuring the base: 20/20 tokens",
        "replies of the base", "replies of the base: 20/20",
        "measuring the adapter", "measuring the adapter: 20/20 tokens",
        "replies of the adapter", "replies of the adapter: 20/20",
    ]  # fmt: skip


def test_long_comparison_prints_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time left is estimated from the current part alone: replies are slower."""
    clock = 0.0
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: clock)
    with evaluate.comparison_bar() as progress:
        for when, done in ((10.0, 0), (20.0, 1000), (60.0, 21_000), (100.0, 61_000)):
            clock = when
            progress("before", "tokens", done, 61_000)
        for when, done in ((100.0, 0), (400.0, 36), (420.0, 72), (460.0, 108), (480.0, 800)):
            clock = when
            progress("before", "replies", done, 800)
    assert lines(capsys) == [
        "loading the model", "measuring the base",
        "measuring the base: 21,000/61,000 tokens, about 1 min 20 s left",
        "measuring the base: 61,000/61,000 tokens",
        "replies of the base", "replies of the base: 36/800",
        "replies of the base: 72/800, about 6 min 44 s left",
        "replies of the base: 108/800, about 9 min 37 s left",
        "replies of the base: 800/800",
    ]  # fmt: skip
