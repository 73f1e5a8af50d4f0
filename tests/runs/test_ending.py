"""What a worker's end means, told by its exit code or by its last word."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.recipe import Recipe
from jetson_ft.runs import ending, rundir
from jetson_ft.runs.rundir import EventLog, Run

SILENT = ("failed", "ended without a word (power cut, or killed); resumable")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = rundir.create(Recipe(output=str(tmp_path)), "x")
    made.write_state("running", attempt=2)
    EventLog(made, 1).emit("error", what="An old error.", where="", fix="")
    return made


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        (0, "finished", ""),
        (3, "stopped", "stopped on request; resumable"),
        (2, "failed", "ended with code 2; see log.txt"),
        (1, "failed", "ended with code 1; see log.txt"),
        (-11, "failed", "crashed (signal 11)"),
        (-40, "failed", "crashed (signal 40)"),
        (-9, "failed", "crashed (signal 9); most likely the kernel ended it for want of memory"),
    ],
)
def test_exit_codes(run: Run, code: int, state: str, reason: str) -> None:
    """The error of an earlier attempt is no reason for this one's end."""
    assert ending.of_code(run, code) == (state, reason)


def test_a_refusal_is_told_in_its_own_words(run: Run) -> None:
    EventLog(run, 2).emit("error", what="No such file.", where="rows.json", fix="")
    assert ending.of_code(run, 2) == ("failed", "No such file.")


def test_who_had_no_last_word_ended_without_one(run: Run) -> None:
    EventLog(run, 1).emit("end", code=0)
    assert ending.unwatched(run) == SILENT


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (3, "stopped"), (1, "failed")])
def test_the_last_word_counts(run: Run, code: int, state: str) -> None:
    EventLog(run, 2).emit("end", code=code)
    assert ending.unwatched(run)[0] == state
