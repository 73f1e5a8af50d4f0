"""The queue: first come first served; dead processes block nobody."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jetson_ft.runs.queue import QueueTicket, microseconds, running_run, waiting

RUN = Path("/runs/a run")


@pytest.fixture(autouse=True)
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of this test's own queue."""
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    return tmp_path / "queue"


def test_taken_slot_goes_to_the_next_ticket_when_released() -> None:
    first, second = QueueTicket(1.0), QueueTicket(2.0)
    held = first.try_take(RUN)
    assert held and second.try_take(RUN) is None
    held.close()
    assert second.try_take(RUN)


def test_order_is_by_time_of_request_not_of_arrival() -> None:
    late, early = QueueTicket(20.0), QueueTicket(10.0)
    assert late.try_take(RUN) is None, "an older request is waiting"
    held = early.try_take(RUN)
    assert held
    held.close()
    assert late.try_take(RUN)


def test_waiting_times_are_those_of_living_tickets(queue: Path) -> None:
    tickets = [QueueTicket(2.5), QueueTicket(1.0)]
    (queue / f"{0:020d}-of-a-dead-process").touch()
    assert sorted(waiting()) == [1_000_000, 2_500_000]
    tickets[0].cancel()
    assert waiting() == [microseconds(1.0)]


def test_equal_times_let_one_pass() -> None:
    tickets = [QueueTicket(5.0), QueueTicket(5.0)]
    slots = [ticket.try_take(RUN) for ticket in tickets]
    assert sum(slot is not None for slot in slots) == 1


def test_given_up_ticket_lets_the_next_pass(queue: Path) -> None:
    first, second = QueueTicket(1.0), QueueTicket(2.0)
    first.cancel()
    first.cancel()
    assert second.try_take(RUN)
    assert [path.name for path in queue.iterdir()] == ["slot"]


def test_ticket_of_a_dead_process_is_removed(queue: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            waiting = QueueTicket(1.0)
            assert waiting
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(queue.iterdir())) == 1
    assert QueueTicket(2.0).try_take(RUN)
    assert [path.name for path in queue.iterdir()] == ["slot"]


def test_ticket_is_locked_before_it_is_visible(
    queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another waiting process would take it for a dead one's and remove it."""
    other, replace, seen = QueueTicket(9.0), Path.replace, []

    def spy(source: Path, target: Path) -> Path:
        shown = replace(source, target)
        seen.append(other.try_take(RUN))
        return shown

    monkeypatch.setattr(Path, "replace", spy)
    assert QueueTicket(1.0).try_take(RUN)
    assert seen == [None]


def test_running_run_is_the_folder_of_the_slots_owner() -> None:
    assert running_run() is None
    for run in (RUN, Path("/runs/b")):
        held = QueueTicket(1.0).try_take(run)
        assert held and running_run() == run
        held.close()
        assert running_run() is None
