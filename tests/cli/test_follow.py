"""What a run looks like where there is no terminal, and what is printed at its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import step_event

from jetson_ft import events
from jetson_ft.cli import follow
from jetson_ft.errors import Message, UserError
from jetson_ft.files import write_json
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.store import Run

Follow = Callable[..., list[str]]


def warned(text: str) -> events.Warned:
    return events.Warned.of_message(Message("{text}", {"text": text}))


def step(number: int, total: int | None = 3, left: float | None = 65.0) -> events.Step:
    return step_event(
        number, total_steps=total, seconds_left=left, tokens_per_second=1234.4, memory=3 * 2**30
    )


def emit(run: Run, *emitted: events.Event) -> None:
    log = EventLog(run, run.state().attempt)
    for event in emitted:
        log.emit(event)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = store.create_run(Recipe(output_dir=str(tmp_path)), "demo")
    made.write_state("finished")
    return made


@pytest.fixture
def followed(run: Run, capsys: pytest.CaptureFixture[str]) -> Follow:
    """Write events, follow the run, and return the lines that were printed."""

    def follow_run(*emitted: events.Event) -> list[str]:
        emit(run, *emitted)
        assert follow.Follower(run).follow().state == "finished"
        return [line for line in capsys.readouterr().out.splitlines() if line.strip()]

    return follow_run


def test_following_again_after_an_interrupt_prints_nothing_twice(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    emit(run, warned("hot"))
    follower = follow.Follower(run)
    follower.follow()
    follower.follow()
    assert capsys.readouterr().out.count("hot") == 1


def test_without_a_terminal_plain_lines_are_printed(followed: Follow) -> None:
    lines = followed(
        events.PhaseStarted(name="data", detail="rows.json"),
        *map(step, (1, 2, 3)),
        events.Evaluated(step=3, heldout_loss=2.25, bits_per_char=3.5, seconds=1.0),
        events.Generated(side="before", done=2, total=4),
        events.Generated(side="before", done=4, total=4),
    )
    assert lines == [
        "data: rows.json",
        "step 1/3  loss 2.500  held-out –  1,234 tokens/s  3.00 GiB  1 min 05 s left",
        "step 3/3  loss 2.500  held-out –  1,234 tokens/s  3.00 GiB  1 min 05 s left",
        "  step 3: held-out loss 2.250, 3.500 bits per character",
        "  replies of the base: 4/4",
    ]
    assert not any("\x1b" in line or "━" in line for line in lines)


def test_download_is_printed_with_its_progress(followed: Follow) -> None:
    size = {"file": "m.safetensors", "total": 2_836_000_000}
    assert followed(
        events.PhaseStarted(name="model files", detail="o/n"),
        events.Download(**size, done=312_500_000, seconds_left=None),
        events.Download(**size, done=700_000_000, seconds_left=65.0),
        events.PhaseEnded(name="model files", seconds=900.0),
    ) == ["model files: o/n", "  m.safetensors: 312/2,836 MB"]


def test_unknown_values_are_dashes_and_unknown_kinds_are_ignored(
    run: Run, followed: Follow
) -> None:
    run.events_file.write_text('{"schema": 1, "t": 1, "attempt": 1, "kind": "later", "x": 1}\n')
    nan = events.Evaluated(
        step=1, heldout_loss=float("nan"), bits_per_char=float("inf"), seconds=1.0
    )
    lines = followed(step(1, total=None, left=None), nan)
    assert lines[0].startswith("step 1/?") and lines[0].endswith("measuring")
    assert lines[1:] == ["  step 1: held-out loss –, – bits per character"]


def test_resumed_run_is_followed_from_its_resumption(run: Run, followed: Follow) -> None:
    emit(run, warned("old"))
    run.write_state("finished", attempt=2)
    assert followed(warned("new")) == ["warning: new"]


def test_queued_run_prints_its_reason_once(
    run: Run, followed: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(["queued", "queued", "queued", "finished"])
    monkeypatch.setattr(follow.manager, "reconcile_state", lambda run: next(states))
    monkeypatch.setattr(follow, "_POLL_SECONDS", 0)
    run.write_state("finished", Message("another run is training; this one starts after it"))
    assert followed() == ["waiting: another run is training; this one starts after it"]


def test_stop_request_is_printed_once(
    run: Run, followed: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(["running", "running", "finished"])
    monkeypatch.setattr(follow.manager, "reconcile_state", lambda run: next(states))
    monkeypatch.setattr(follow, "_POLL_SECONDS", 0)
    run.request_stop()
    assert followed() == ["stopping: a checkpoint is being written"]


def test_control_characters_and_markup_in_events_are_printed_as_text(followed: Follow) -> None:
    assert followed(
        warned("\x1b[31mred [bold]x[/bold] \x07"),
        events.PhaseStarted(name="data", detail="[/red]rows.json"),
    ) == ["warning: \\x1b[31mred [bold]x[/bold] \\x07", "data: [/red]rows.json"]


def test_data_weights_plan_total_steps_and_best_have_their_lines(followed: Follow) -> None:
    source = {
        "files": [{"path": "rows.json"}], "container": "json", "layout": "alpaca",
        "encoding": "utf-8", "rows_read": 1200, "rows_kept": 1195, "duplicates": 3, "unread": {},
        "dropped": {"empty answer": {"count": 2, "where": ["row 4", "row 9"]}},
    }  # fmt: skip
    read = {
        "sources": [{"name": "rows.json", "read": source}],
        "heldout_from": "held.json", "left_out": 1,
        "heldout": [{"name": "held.json", "read": source | {
            "files": [{"path": "held.json"}], "layout": "messages", "unread": {"id": 60},
            "dropped": {"no answer": {"count": 1, "where": ["row 7"]}},
        }}],
    }  # fmt: skip
    train = {
        "rows": 1190, "tokens": 50000, "supervised_tokens": 20000, "truncated": 4,
        "dropped": {"longer than max_length": 2},
    }  # fmt: skip
    heldout = train | {
        "rows": 60, "tokens": 3000, "truncated": 0,
        "dropped": {"no answer within max_length": 9},
    }  # fmt: skip
    parts = {"embedding": 2**20, "head": 0, "linear": 3 * 2**20}
    assert followed(
        events.DataPrepared(sha256="", train=train, heldout=heldout, read=read),
        events.WeightsLoaded(bytes=parts, fused={}),
        events.Planned(
            steps_at_most=300, micro_batch_tokens=0, checkpointing=True, shards=1, parts={},
            peak_memory_bytes=3 * 2**30, seconds=90.0, other_seconds=20.0, packing=False,
        ),
        events.TotalSteps(step=5, total_steps=40, seconds_left=120.0),
        events.BestSelected(step=30, heldout_loss=2.0),
    ) == [
        "file:      rows.json",
        "format:    json, alpaca, utf-8",
        "rows:      1,200 read, 1,195 usable, 3 duplicates",
        "unusable:  2 empty answer (row 4, row 9)",
        "train on:  1,190 rows, 50,000 tokens, 20,000 supervised",
        "left out:  1 that are also in the held-out set",
        "cut:       4 rows (0.3%) at max_length",
        "dropped:   2 longer than max_length",
        "file:      held.json",
        "format:    json, messages, utf-8",
        "rows:      1,200 read, 1,195 usable, 3 duplicates",
        "not read:  id (60)",
        "unusable:  1 no answer (row 7)",
        "held out:  60 rows, 3,000 tokens, 20,000 supervised (from held.json)",
        "cut:       0 rows (0.0%) at max_length",
        "dropped:   9 no answer within max_length",
        "  4.0 MiB: embedding 1.0, linear 3.0",
        "plan: at most 300 steps; micro-batches of one row, recomputing activations",
        "  predicted: 3.00 GiB at most, 1 min 30 s of training and measuring, "
        "20 s of loading and comparing",
        "  timed: 40 steps fit, 2 min 00 s left",
        "  the adapter is taken from step 30, the best on held-out rows",
    ]  # fmt: skip


def test_notice_of_the_rows_is_printed_once(followed: Follow) -> None:
    notice = Message("3 answers are not trained on")
    train = {
        "rows": 9, "tokens": 90, "supervised_tokens": 30, "truncated": 0, "dropped": {},
        "notices": [notice.as_json()],
    }  # fmt: skip
    read = {"sources": [], "heldout": [], "heldout_from": "rows.json", "left_out": 0}
    printed = followed(
        events.DataPrepared(sha256="", train=train, heldout=train | {"notices": []}, read=read),
        events.Warned.of_message(notice),
    )
    assert [line for line in printed if str(notice) in line] == [f"warning: {notice}"]


def test_power_temperature_and_pauses_are_printed_where_they_are_known(followed: Follow) -> None:
    assert followed(
        events.Sensors(step=1, source="jtop", watts=19.96, temperature=81.6, memory_used=1),
        step(3),
        events.Paused(step=3, temperature=86.2, limit=85.0, until=80.0),
        events.PauseEnded(step=3, temperature=79.5, seconds=75.0),
    ) == [
        "step 3/3  loss 2.500  held-out –  1,234 tokens/s  3.00 GiB  20.0 W  82 °C  "
        "1 min 05 s left",
        "  pausing after step 3: 86 °C, the limit is 85; it continues below 80",
        "  paused for 1 min 15 s",
    ]


# --- ends ---


def test_stopped_run_prints_how_to_resume(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_state("stopped", Message("stopped on request; resumable"))
    follow.print_end(run, run.state())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Continue with: jetson-ft train --resume {run.path}"


def test_failed_run_prints_what_where_and_fix_to_stderr(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError("Disk{escape} full.", "/runs", "Make room.", escape="\x1b")
    emit(run, events.Failed(**error.as_json()))
    run.write_state("failed", Message("x"))
    (run.path / "log.txt").touch()
    follow.print_end(run, run.state())
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "error: Disk\\x1b full.", "  where: /runs", "  fix:   Make room.",
        f"  log:   {run.path / 'log.txt'}",
    ]  # fmt: skip
    assert printed.out == ""


def test_error_of_an_earlier_attempt_is_not_printed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    emit(run, events.Failed(**UserError("Old.").as_json()))
    run.write_state("failed", Message("crashed (signal 9)"), attempt=2)
    follow.print_end(run, run.state())
    error = capsys.readouterr().err
    assert "crashed (signal 9)" in error and "Old." not in error


def report() -> dict[str, Any]:
    figures = {
        "loss": 3.0, "bits_per_char": 4.0, "chinese_share": 0.1, "stop_rate": 0.5,
        "repetition": 0.1, "chrf": 5.0, "bleu": 1.0,
    }  # fmt: skip
    return {
        "eval": {"rows": 66, "before": figures, "after": figures | {"chinese_share": 0.93}},
        "train": {
            "steps": 40, "best_step": 40, "tokens": 90_000, "seconds": 245.0,
            "tokens_per_second": 367.3, "peak_memory_bytes": 2 * 2**30,
        },
    }  # fmt: skip


def test_finished_run_prints_figures_and_paths(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(run.path / "report.json", report())
    follow.print_end(run, run.state())
    text = capsys.readouterr().out
    assert re.search(r"Chinese share of the replies\s+│?\s*10%\s+│?\s*93%", text)
    assert "40 steps, 90,000 tokens in 4 min 05 s (367 tokens/s), peak memory 2.00 GiB" in text
    for place in (run.adapter, run.path / "report.html", f"jetson-ft chat {run.name}"):
        assert str(place) in text


def test_finished_run_without_comparison_prints_why(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = report() | {"eval": None, "comparison_error": "Out of memory."}
    write_json(run.path / "report.json", failed)
    follow.print_end(run, run.state())
    text = capsys.readouterr().out
    assert "warning: Out of memory." in text and "40 steps, 90,000 tokens" in text
    assert "held-out" not in text
