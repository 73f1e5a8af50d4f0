"""The run directory: names, states, locks and events that bear a crash and a crowd."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson_ft.errors import UserError
from jetson_ft.recipe import Recipe
from jetson_ft.runs import rundir
from jetson_ft.runs.rundir import EventLog, Run, last_attempts, lock, read_events


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = rundir.create(Recipe(output=str(tmp_path / "runs")), "demo")
    made.write_state("queued")
    return made


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "stem"),
    [
        ("demo", "demo"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf", "rf"),
        ("a b/c\x1b[31m<b>", "a-b-c-31m-b"),
        ("\0", "run"),
        ("中文", "run"),
        ("x" * 500, "x" * 60),
    ],
)
def test_a_run_gets_a_harmless_name_inside_the_root(tmp_path: Path, label: str, stem: str) -> None:
    made = rundir.create(Recipe(output=str(tmp_path / "runs")), label)
    assert made.path.parent == tmp_path / "runs"
    assert made.name.split("-", 2)[2] == stem
    assert made.recipe() == Recipe(output=str(tmp_path / "runs"))


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path) -> None:
    made = {rundir.create(Recipe(output=str(tmp_path)), "same").path for _ in range(4)}
    assert len(made) == 4


def test_an_unwritable_root_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="A file stands where a folder is needed"):
        rundir.create(Recipe(output=str(tmp_path / "runs")), "x")


@pytest.mark.parametrize("name", ["../x", "../../etc", "-rf", "a\0b", "", "no-such-run"])
def test_unknown_names_are_refused_and_the_newest_named(run: Run, name: str) -> None:
    with pytest.raises(UserError, match="There is no run") as caught:
        rundir.find(name, run.path.parent)
    assert run.name in caught.value.fix


def test_a_name_never_leaves_the_root(run: Run) -> None:
    """A folder beside the root is a run only by its path from here, not by its name from there."""
    root = run.path.parent / "inner"
    root.mkdir()
    with pytest.raises(UserError):
        rundir.find(f"../{run.name}", root)


def test_runs_are_found_by_path_name_and_latest(run: Run) -> None:
    root = run.path.parent
    for name in (str(run.path), run.name, "latest"):
        assert rundir.find(name, root).path == run.path
    assert [found.name for found in rundir.list_runs(root)] == [run.name]
    assert rundir.list_runs(root / "none") == []


def test_a_run_being_made_is_not_one_yet(tmp_path: Path) -> None:
    made = rundir.create(Recipe(output=str(tmp_path)), "x")
    assert rundir.list_runs(tmp_path) == []
    made.write_state("queued")
    assert len(rundir.list_runs(tmp_path)) == 1


# --- state -----------------------------------------------------------------------------------


def test_a_state_keeps_birth_and_attempt(run: Run) -> None:
    first = run.state()
    run.write_state("failed", "because", attempt=3)
    run.write_state("queued")
    second = run.state()
    assert (second.attempt, second.created, second.reason) == (3, first.created, "")
    assert second.updated > first.updated


def test_a_state_of_a_later_release_is_read(run: Run) -> None:
    path = run.path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mood": "good"}))
    assert run.state().state == "queued"


def test_asking_to_stop_twice_is_asking_once(run: Run) -> None:
    assert not run.stop_requested()
    run.request_stop()
    run.request_stop()
    assert run.stop_requested()
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested()


# --- locks -----------------------------------------------------------------------------------


def test_a_lock_is_seen_until_it_is_closed(run: Run) -> None:
    assert not run.is_live()
    held = lock(run.path / "worker.lock")
    assert held and run.is_locked("worker") and run.is_live() and not run.is_locked("supervisor")
    assert lock(run.path / "worker.lock") is None
    held.close()
    assert not run.is_live()


def test_a_lock_dies_with_its_process(run: Run) -> None:
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = lock(run.path / "worker.lock")
            os.write(go, b"x" if held else b"-")
            threading.Event().wait(60)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    assert run.is_live()
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not run.is_live()


def test_who_is_patient_outwaits_somebody_who_only_looks(run: Run) -> None:
    """`is_locked` holds a free lock for a moment; a starting worker must not give up for that."""
    held = lock(run.path / "worker.lock")
    assert held
    timer = threading.Timer(0.1, held.close)
    timer.start()
    mine = lock(run.path / "worker.lock", patience=10.0)
    timer.join()
    assert mine and lock(run.path / "worker.lock", patience=0.05) is None


# --- events ----------------------------------------------------------------------------------


def test_events_carry_schema_time_and_attempt(run: Run) -> None:
    EventLog(run, attempt=2).emit("step", step=1, loss=2.5)
    ((event),) = run.events()
    assert event.pop("t") > 1.7e9
    assert event == {"schema": 1, "attempt": 2, "kind": "step", "step": 1, "loss": 2.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_becomes_null(run: Run, value: float) -> None:
    EventLog(run, 1).emit("step", step=1, loss=value)
    assert "NaN" not in run.events_file.read_text() and "Inf" not in run.events_file.read_text()
    assert run.events()[0]["loss"] is None


def test_a_half_written_line_waits_for_its_other_half(run: Run) -> None:
    log = EventLog(run, 1)
    log.emit("phase", name="one")
    with open(run.events_file, "ab") as file:
        file.write(b'{"kind": "phase", "na')
    events, offset = read_events(run.events_file)
    assert [event["name"] for event in events] == ["one"]
    with open(run.events_file, "ab") as file:
        file.write(b'me": "two"}\n')
    events, end = read_events(run.events_file, offset)
    assert [event["name"] for event in events] == ["two"]
    assert read_events(run.events_file, end) == ([], end)


def test_a_line_cut_by_a_power_cut_spoils_no_other(run: Run) -> None:
    run.events_file.write_bytes(b'{"kind": "phase", "na')
    EventLog(run, 2).emit("phase", name="after")
    assert [event["name"] for event in run.events()] == ["after"]


def test_damaged_lines_are_passed_over(run: Run) -> None:
    good = b'{"kind": "x"}\n'
    run.events_file.write_bytes(good + b"\xff\xfe\n[1]\n3\n{}\n\n" + good)
    assert len(run.events()) == 2


def test_reading_is_bounded(run: Run) -> None:
    log = EventLog(run, 1)
    for number in range(50):
        log.emit("phase", name=str(number))
    names, offset = [], 0
    while True:
        events, after = read_events(run.events_file, offset, limit=300)
        if after == offset:
            break
        assert after - offset <= 300
        names += [event["name"] for event in events]
        offset = after
    assert names == [str(number) for number in range(50)]


def test_no_file_has_no_events(run: Run) -> None:
    assert run.events() == []
    assert read_events(run.events_file, 17) == ([], 17)


def test_a_disk_that_takes_half_a_line_is_asked_for_the_rest(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = EventLog(run, 1), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    log.emit("phase", name="whole")
    assert run.events()[0]["name"] == "whole"

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="disk is full"):
        log.emit("phase", name="lost")


def test_two_writers_never_mix_their_lines(run: Run) -> None:
    logs = [EventLog(run, number) for number in (1, 2)]
    threads = [
        threading.Thread(target=lambda log=log: [log.emit("x", text="字" * 500) for _ in range(80)])  # type: ignore[misc]
        for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.events()) == 160


def step(number: int, attempt: int, kind: str = "step") -> dict[str, Any]:
    return {"kind": kind, "step": number, "attempt": attempt}


def test_of_a_step_made_twice_the_last_attempt_counts() -> None:
    events = [step(1, 1), step(2, 1), step(2, 1, "eval"), step(3, 1), {"kind": "phase"}, step(2, 2)]
    assert last_attempts(events) == [
        step(1, 1), step(2, 1, "eval"), step(3, 1), {"kind": "phase"}, step(2, 2),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3))))
def test_each_step_is_kept_from_one_attempt(made: list[tuple[int, int]]) -> None:
    events = [step(number, attempt) for number, attempt in made]
    kept = last_attempts(events)
    assert {event["step"] for event in kept} == {number for number, _ in made}
    for event in kept:
        assert event["attempt"] == max(a for n, a in made if n == event["step"])


@given(st.binary(max_size=300), st.integers(0, 50))
def test_any_bytes_are_read_without_a_fault(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, limit: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    events, offset = read_events(path, 0, limit)
    assert 0 <= offset <= min(limit, len(data))
    assert all("kind" in event for event in events)
