"""The queue: first come first served, and the dead hold nobody up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jetson_ft.runs.slot import Slot, holder

RUN = Path("/runs/a run")


@pytest.fixture(autouse=True)
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A queue of this test's own."""
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path))
    return tmp_path / "queue"


def test_one_has_the_slot_and_the_next_gets_it_after() -> None:
    first, second = Slot(1.0), Slot(2.0)
    held = first.try_take(RUN)
    assert held and second.try_take(RUN) is None
    held.close()
    assert second.try_take(RUN)


def test_order_is_that_of_asking_not_of_arriving() -> None:
    late, early = Slot(20.0), Slot(10.0)
    assert late.try_take(RUN) is None, "somebody who asked before is waiting"
    held = early.try_take(RUN)
    assert held
    held.close()
    assert late.try_take(RUN)


def test_equal_times_block_nobody() -> None:
    slots = [Slot(5.0), Slot(5.0)]
    held = [slot.try_take(RUN) for slot in slots]
    assert sum(found is not None for found in held) == 1


def test_who_leaves_lets_the_others_pass(queue: Path) -> None:
    first, second = Slot(1.0), Slot(2.0)
    first.leave()
    first.leave()
    assert second.try_take(RUN)
    assert [path.name for path in queue.iterdir()] == ["slot"]


def test_the_dead_are_swept(queue: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            waiting = Slot(1.0)
            assert waiting
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(queue.iterdir())) == 1
    assert Slot(2.0).try_take(RUN)
    assert [path.name for path in queue.iterdir()] == ["slot"]


def test_a_ticket_is_locked_before_it_can_be_seen(
    queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another one waiting would take it for a dead man's and sweep it."""
    other, replace, seen = Slot(9.0), Path.replace, []

    def spy(source: Path, target: Path) -> Path:
        shown = replace(source, target)
        seen.append(other.try_take(RUN))
        return shown

    monkeypatch.setattr(Path, "replace", spy)
    assert Slot(1.0).try_take(RUN)
    assert seen == [None]


def test_others_see_who_has_it() -> None:
    assert holder() is None
    for run in (RUN, Path("/runs/b")):
        held = Slot(1.0).try_take(run)
        assert held and holder() == run
        held.close()
        assert holder() is None
