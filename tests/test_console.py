"""What a run looks like where there is no terminal, and what is printed at its end."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jetson_ft import console
from jetson_ft.device.doctor import finding
from jetson_ft.recipe import Recipe
from jetson_ft.runs import rundir
from jetson_ft.runs.rundir import EventLog, Run

STEP = {
    "total_steps": 3, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10,
    "tokens_per_second": 1234.4, "seconds_left": 65.0, "memory": 3 * 2**30,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = rundir.create(Recipe(output=str(tmp_path)), "demo")
    made.write_state("finished")
    return made


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is printed where there is no terminal."""
    written = io.StringIO()
    monkeypatch.setattr(
        console, "out", Console(file=written, highlight=False, soft_wrap=True, width=80)
    )
    yield written


def follow(run: Run, offset: int = 0) -> Any:
    return console.Follower(run, offset).follow()


def lines(screen: io.StringIO) -> list[str]:
    return [line for line in screen.getvalue().splitlines() if line.strip()]


def test_without_a_terminal_there_are_plain_lines(run: Run, screen: io.StringIO) -> None:
    log = EventLog(run, 1)
    log.emit("phase", name="data", detail="rows.json")
    for step in (1, 2, 3):
        log.emit("step", step=step, **STEP)
    log.emit("eval", step=3, heldout_loss=2.25, bits_per_char=3.5, seconds=1.0)
    log.emit("compare", side="before", done=2, of=4)
    log.emit("compare", side="before", done=4, of=4)
    assert follow(run).state == "finished"
    assert lines(screen) == [
        "data: rows.json",
        "step 1/3  loss 2.500  held-out –  1,234 tokens/s  3.00 GiB  1 min 05 s left",
        "step 3/3  loss 2.500  held-out –  1,234 tokens/s  3.00 GiB  1 min 05 s left",
        "  step 3: held-out loss 2.250, 3.500 bits per character",
        "  replies of the base: 4/4",
    ]
    assert "\x1b" not in screen.getvalue() and "━" not in screen.getvalue()


def test_measuring_again_tells_how_far_it_is(screen: io.StringIO) -> None:
    with console.comparison_bar() as progress:
        for side in ("before", "after"):
            for part in ("tokens", "replies"):
                for done in (0, 8, 16, 20):
                    progress(side, part, done, 20)
    assert lines(screen) == [
        "loading the model",
        "measuring the base", "measuring the base: 20/20 tokens",
        "replies of the base", "replies of the base: 20/20",
        "measuring the adapter", "measuring the adapter: 20/20 tokens",
        "replies of the adapter", "replies of the adapter: 20/20",
    ]  # fmt: skip


def test_a_long_comparison_tells_what_is_left(
    screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what comes now alone: replies aren't as fast as the measuring before them."""
    clock = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    with console.comparison_bar() as progress:
        for when, done in ((10.0, 0), (20.0, 1000), (60.0, 21_000), (100.0, 61_000)):
            clock = when
            progress("before", "tokens", done, 61_000)
        for when, done in ((100.0, 0), (400.0, 36), (420.0, 72), (460.0, 108), (480.0, 800)):
            clock = when
            progress("before", "replies", done, 800)
    assert lines(screen) == [
        "loading the model", "measuring the base",
        "measuring the base: 21,000/61,000 tokens, about 1 min 20 s left",
        "measuring the base: 61,000/61,000 tokens",
        "replies of the base", "replies of the base: 36/800",
        "replies of the base: 72/800, about 6 min 44 s left",
        "replies of the base: 108/800, about 9 min 37 s left",
        "replies of the base: 800/800",
    ]  # fmt: skip


def test_a_download_tells_how_far_it_is(run: Run, screen: io.StringIO) -> None:
    log = EventLog(run, 1)
    log.emit("phase", name="model files", detail="o/n")
    for done, left in ((312_500_000, None), (700_000_000, 65.0)):
        log.emit(
            "download", file="m.safetensors", done=done, total=2_836_000_000, seconds_left=left
        )
    log.emit("phase_end", name="model files", seconds=900.0)
    follow(run)
    assert lines(screen) == ["model files: o/n", "  m.safetensors: 312/2,836 MB"]


def test_unknown_and_null_are_shown_as_such(run: Run, screen: io.StringIO) -> None:
    log = EventLog(run, 1)
    log.emit("step", step=1, **STEP | {"total_steps": None, "seconds_left": None})
    log.emit("eval", step=1, heldout_loss=float("nan"), bits_per_char=float("inf"), seconds=1.0)
    log.emit("a kind of tomorrow", what=1)
    follow(run)
    assert lines(screen)[0].startswith("step 1/?") and lines(screen)[0].endswith("measuring")
    assert lines(screen)[1] == "  step 1: held-out loss –, – bits per character"


def test_following_a_resumed_run_begins_where_it_resumed(run: Run, screen: io.StringIO) -> None:
    EventLog(run, 1).emit("warning", message="old")
    offset = run.events_file.stat().st_size
    EventLog(run, 2).emit("warning", message="new")
    follow(run, offset)
    assert lines(screen) == ["warning: new"]


def test_waiting_in_the_queue_is_said_once(
    run: Run, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(["queued", "queued", "queued", "finished"])
    run.write_state("queued", "another run is training; this one starts after it")
    monkeypatch.setattr(console.jobs, "settle", lambda run: next(states))
    monkeypatch.setattr(console, "_POLL_SECONDS", 0)
    follow(run)
    assert lines(screen) == ["waiting: another run is training; this one starts after it"]


def test_what_is_in_data_and_names_cannot_steer_the_terminal(run: Run, screen: io.StringIO) -> None:
    log = EventLog(run, 1)
    log.emit("warning", message="\x1b[31mred [bold]x[/bold] \x07")
    log.emit("phase", name="data", detail="[/red]rows.json")
    follow(run)
    assert lines(screen) == ["warning: \\x1b[31mred [bold]x[/bold] \\x07", "data: [/red]rows.json"]


def test_data_weights_plan_length_and_best_have_their_lines(run: Run, screen: io.StringIO) -> None:
    log = EventLog(run, 1)
    read = {
        "train": {
            "container": "json", "layout": "alpaca", "encoding": "utf-8", "rows_read": 1200,
            "duplicates": 3, "dropped": {"empty answer": {"count": 2, "where": ["row 4", "row 9"]}},
        },
        "heldout_from": "the last 60 rows", "left_out": 1,
    }  # fmt: skip
    train = {
        "rows": 1190, "tokens": 50000, "supervised_tokens": 20000, "truncated": 4,
        "dropped": {"longer than max_length": 2},
    }  # fmt: skip
    log.emit("data", train=train, heldout={"rows": 60}, read=read)
    log.emit("weights", bytes={"embedding": 2**20, "head": 0, "linear": 3 * 2**20})
    log.emit(
        "plan", steps_at_most=300, micro_batch_tokens=0, checkpointing=True,
        peak_memory_bytes=3 * 2**30, seconds=90.0,
    )  # fmt: skip
    log.emit("length", step=5, total_steps=40, seconds_left=120.0)
    log.emit("best", step=30, heldout_loss=2.0)
    follow(run)
    assert lines(screen) == [
        "  1,190 rows to learn (50,000 tokens, 20,000 supervised), 60 held out",
        "  cut at max_length: 4; dropped: 2 longer than max_length",
        "  json, alpaca, utf-8: 1,200 rows read, 3 duplicates; held out: the last 60 rows",
        "  left out, empty answer: 2 (row 4, row 9)",
        "  left out, also in the held-out set: 1",
        "  4.0 MiB: embedding 1.0, linear 3.0",
        "plan: at most 300 steps; micro-batches of one row, recomputing activations",
        "  predicted: 3.00 GiB at most, 1 min 30 s of training and measuring",
        "  timed: 40 steps fit, 2 min 00 s to go",
        "  the adapter is taken from step 30, the best on held-out rows",
    ]


def test_power_heat_and_pauses_are_told_where_they_are_known(run: Run, screen: io.StringIO) -> None:
    log = EventLog(run, 1)
    log.emit("sample", step=1, watts=19.96, temperature=81.6, memory_used=1)
    log.emit("step", step=3, **STEP)
    log.emit("pause", step=3, temperature=86.2, limit=85.0, until=80.0)
    log.emit("pause_end", step=3, temperature=79.5, seconds=75.0)
    follow(run)
    assert lines(screen) == [
        "step 3/3  loss 2.500  held-out –  1,234 tokens/s  3.00 GiB  20.0 W  82 °C  "
        "1 min 05 s left",
        "  pausing after step 3: 86 °C, the limit is 85; it goes on below 80",
        "  paused for 1 min 15 s",
    ]


def test_in_a_terminal_a_fix_can_be_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=40, soft_wrap=True)
    monkeypatch.setattr(console, "out", screen)
    found = finding.warning("swap.none")
    assert console.print_doctor([found, finding.ok("torch.cpu", version="2.9")]) != []
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue())
    assert f"fix: {found.fix()}\n" in text
    first, *_ = text.splitlines()
    assert first.startswith("!  Swap ") and len(first) <= 40
    assert "✓  PyTorch       2.9, for the" in text


# --- endings -----------------------------------------------------------------------------------


def ending(run: Run) -> None:
    console.print_ending(run, run.state())


def test_a_stopped_run_says_how_to_go_on(run: Run, screen: io.StringIO) -> None:
    run.write_state("stopped", "stopped on request; resumable")
    ending(run)
    assert lines(screen)[-1] == f"Go on with: jetson-ft train --resume {run.path}"


def test_a_failed_run_says_what_where_and_how_to_mend_it(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    EventLog(run, 1).emit("error", what="Disk\x1b full.", where="/runs", fix="Make room.")
    run.write_state("failed", "x")
    ending(run)
    assert capsys.readouterr().err.splitlines() == [
        "error: Disk\\x1b full.", "  where: /runs", "  fix:   Make room.",
        f"  log:   {run.path / 'log.txt'}",
    ]  # fmt: skip


def test_an_old_error_is_not_told_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    EventLog(run, 1).emit("error", what="Old.", where="", fix="")
    run.write_state("failed", "crashed (signal 9)", attempt=2)
    ending(run)
    assert "crashed (signal 9)" in capsys.readouterr().err


def report() -> dict[str, Any]:
    figures = {
        "loss": 3.0, "bits_per_char": 4.0, "chinese_share": 0.1, "stop_rate": 0.5,
        "repetition": 0.1, "chrf": 5.0, "bleu": 1.0,
    }  # fmt: skip
    return {
        "eval": {"rows": 66, "before": figures, "after": figures | {"chinese_share": 0.93}},
        "train": {
            "steps": 40, "tokens": 90_000, "seconds": 245.0, "tokens_per_second": 367.3,
            "peak_memory_bytes": 2 * 2**30,
        },
    }  # fmt: skip


def test_a_finished_run_shows_figures_and_places(run: Run, screen: io.StringIO) -> None:
    from jetson_ft.paths import write_json

    write_json(run.path / "report.json", report())
    ending(run)
    text = screen.getvalue()
    assert re.search(r"Chinese share of the replies\s+│?\s*10%\s+│?\s*93%", text)
    assert "40 steps, 90,000 tokens in 4 min 05 s (367 tokens/s), peak memory 2.00 GiB" in text
    for place in (run.adapter, run.path / "report.html", f"jetson-ft chat {run.name}"):
        assert str(place) in text


def test_learnt_pieces_are_marked_without_colours(screen: io.StringIO) -> None:
    console._print_piece("[x]", False)
    console._print_piece("答", True)
    assert screen.getvalue() == "[x]⟦答⟧"
