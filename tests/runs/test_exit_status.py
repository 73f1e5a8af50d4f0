"""The run's state after the worker's end, by its exit code or by its last event."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetson_ft.errors import UserError
from jetson_ft.events import Exited, Failed
from jetson_ft.recipe import Recipe
from jetson_ft.runs import exit_status, store
from jetson_ft.runs.store import EventLog, Run


def result(status: exit_status.ExitStatus) -> tuple[str, str, bool]:
    return status.state, str(status.message or ""), status.resumable


def error(what: str) -> Failed:
    return Failed(**UserError(what, "rows.json").as_json())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = store.create_run(Recipe(output_dir=str(tmp_path)), "x")
    made.write_state("running", attempt=2)
    EventLog(made, 1).emit(error("An old error."))
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
        (-9, "failed", "crashed (signal 9)"),
    ],
)
def test_exit_code_gives_state_and_reason_without_earlier_attempts_errors(
    run: Run, code: int, state: str, reason: str
) -> None:
    expected = (state, reason, state == "stopped")
    assert result(exit_status.state_for_exit_code(run, code)) == expected


def test_refusal_gives_its_error_as_reason(run: Run) -> None:
    EventLog(run, 2).emit(error("No such file."))
    assert result(exit_status.state_for_exit_code(run, 2)) == ("failed", "No such file.", False)


def test_no_supervisor_and_no_exit_event_is_a_resumable_failure(run: Run) -> None:
    EventLog(run, 1).emit(Exited(code=0))
    state, reason, resumable = result(exit_status.state_from_events(run))
    assert (state, resumable) == ("failed", True) and "power cut" in reason


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (3, "stopped"), (1, "failed")])
def test_no_supervisor_takes_the_exit_events_code(run: Run, code: int, state: str) -> None:
    EventLog(run, 2).emit(Exited(code=code))
    assert exit_status.state_from_events(run).state == state
