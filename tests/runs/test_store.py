"""The run directory: names, state, locks and events, after crashes and with several writers."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import make_run, step_event
from workbench import is_live

from jetson_ft.errors import Message, UserError
from jetson_ft.events import CheckpointSaved, Event, PhaseStarted, Sensors, Step
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.runs.event_log import EventLog, emit_once
from jetson_ft.runs.event_reader import last_attempt_events, read_events
from jetson_ft.runs.locks import lock
from jetson_ft.runs.processes import stop_on_sigterm
from jetson_ft.runs.store import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = store.create_run(Recipe(output_dir=str(tmp_path / "runs")), "demo")
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
def test_label_becomes_a_safe_name_inside_the_root(tmp_path: Path, label: str, stem: str) -> None:
    made = store.create_run(Recipe(output_dir=str(tmp_path / "runs")), label)
    assert made.path.parent == tmp_path / "runs"
    assert made.name.split("-", 2)[2] == stem
    assert made.recipe() == Recipe(output_dir=str(tmp_path / "runs"))


def test_runs_of_the_same_second_have_own_folders(tmp_path: Path) -> None:
    made = {store.create_run(Recipe(output_dir=str(tmp_path)), "same").path for _ in range(4)}
    assert len(made) == 4


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="Expected a folder, found a file"):
        store.create_run(Recipe(output_dir=str(tmp_path / "runs")), "x")


@pytest.mark.parametrize("name", ["../x", "../../etc", "-rf", "a\0b", "", "no-such-run"])
def test_unknown_name_is_refused_with_the_newest_runs(run: Run, name: str) -> None:
    with pytest.raises(UserError, match="not found") as caught:
        store.find_run(name, run.path.parent)
    assert run.name in str(caught.value.fix)


def test_name_outside_the_root_is_refused(run: Run) -> None:
    """A run outside the root is found by its path and not by a name relative to the root."""
    root = run.path.parent / "inner"
    root.mkdir()
    with pytest.raises(UserError):
        store.find_run(f"../{run.name}", root)


def test_runs_are_found_by_path_name_and_latest(run: Run) -> None:
    root = run.path.parent
    for name in (str(run.path), run.name, "latest"):
        assert store.find_run(name, root).path == run.path
    assert [entry.name for entry in store.list_runs(root)] == [run.name]
    assert store.list_runs(root / "none") == []


def test_run_without_a_state_is_not_listed(tmp_path: Path) -> None:
    made = store.create_run(Recipe(output_dir=str(tmp_path)), "x")
    assert store.list_runs(tmp_path) == []
    made.write_state("queued")
    assert len(store.list_runs(tmp_path)) == 1


def test_runs_with_a_finished_adapter_are_listed_newest_first(tmp_path: Path) -> None:
    assert store.runs_with_adapter(tmp_path / "none") == []
    for name in ("1-old", "2-none", "3-file", "4-new"):
        make_run(tmp_path, name)
    for name in ("1-old", "4-new"):
        (tmp_path / name / "adapter").mkdir()
    (tmp_path / "3-file" / "adapter").touch()
    assert [run.name for run in store.runs_with_adapter(tmp_path)] == ["4-new", "1-old"]


# --- state -----------------------------------------------------------------------------------


def test_new_state_keeps_creation_time_and_attempt(run: Run) -> None:
    first = run.state()
    message = Message("because of {cause}", {"cause": "heat"})
    run.write_state("failed", message, resumable=True, attempt=3)
    failed = run.state()
    assert failed.reason == "because of heat" and failed.resumable
    assert failed.message and Message.from_json(failed.message) == message
    run.write_state("queued")
    second = run.state()
    assert (second.attempt, second.created, second.reason) == (3, first.created, "")
    assert second.message is None and not second.resumable
    assert second.updated > first.updated


def test_state_with_unknown_keys_is_read(run: Run) -> None:
    path = run.path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mood": "good"}))
    assert run.state().state == "queued"


def test_two_stop_requests_equal_one(run: Run) -> None:
    assert not run.stop_requested()
    run.request_stop()
    run.request_stop()
    assert run.stop_requested()
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested()


@pytest.mark.parametrize("person_is_first", [True, False])
def test_request_of_a_person_counts_beside_a_shutdown(run: Run, person_is_first: bool) -> None:
    run.request_stop(is_shutdown=not person_is_first)
    assert run.is_shutting_down() is not person_is_first
    run.request_stop(is_shutdown=person_is_first)
    assert run.stop_requested() and not run.is_shutting_down()
    run.clear_stop()
    assert not run.stop_requested() and not run.is_shutting_down()


def test_event_of_the_supervisor_leaves_no_file_open(run: Run) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for name in ("first", "second"):
        emit_once(run, PhaseStarted(name=name))
    assert len(list(descriptors.iterdir())) == before
    assert [(e.name, e.attempt) for e in run.iter_events(PhaseStarted)] == [
        ("first", 1), ("second", 1),
    ]  # fmt: skip


def test_sigterm_that_cannot_be_recorded_interrupts_nothing(run: Run) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        stop_on_sigterm(run)
        (run.path / "shutdown").symlink_to("missing/folder")
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not run.stop_requested()


# --- locks -----------------------------------------------------------------------------------


def test_lock_is_held_until_it_is_closed(run: Run) -> None:
    assert not is_live(run)
    held = lock(run.path / "worker.lock")
    assert held and run.is_locked("worker") and is_live(run) and not run.is_locked("supervisor")
    assert lock(run.path / "worker.lock") is None
    held.close()
    assert not is_live(run)


def test_lock_of_a_killed_process_is_free(run: Run) -> None:
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
    assert is_live(run)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not is_live(run)


def test_patient_lock_waits_for_a_short_owner(run: Run) -> None:
    """`is_locked` holds a free lock for a moment; a starting worker must not give up for that."""
    held = lock(run.path / "worker.lock")
    assert held
    timer = threading.Timer(0.1, held.close)
    timer.start()
    mine = lock(run.path / "worker.lock", timeout=10.0)
    timer.join()
    assert mine and lock(run.path / "worker.lock", timeout=0.05) is None


# --- events ----------------------------------------------------------------------------------


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events if isinstance(event, PhaseStarted)]


def test_events_carry_schema_time_and_attempt(run: Run) -> None:
    EventLog(run, attempt=2).emit(PhaseStarted(name="data"))
    (event,) = run.events()
    assert event.t > 1.7e9 and event.attempt == 2
    assert json.loads(run.events_file.read_text()) == {
        "schema": 1, "t": event.t, "attempt": 2, "kind": "phase", "name": "data", "detail": "",
    }  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_becomes_null(run: Run, value: float) -> None:
    EventLog(run, 1).emit(step_event(1, loss=value))
    assert "NaN" not in run.events_file.read_text() and "Inf" not in run.events_file.read_text()
    (event,) = run.events()
    assert event == step_event(1, loss=None, t=event.t, attempt=1)


def test_unknown_sensor_readings_are_left_out(run: Run) -> None:
    EventLog(run, 1).emit(Sensors(step=1, source="psutil", memory_used=5))
    line = json.loads(run.events_file.read_text())
    assert line.keys() == {"schema", "t", "attempt", "kind", "step", "source", "memory_used"}


def test_half_written_line_is_read_when_complete(run: Run) -> None:
    log = EventLog(run, 1)
    log.emit(PhaseStarted(name="one"))
    with open(run.events_file, "ab") as file:
        file.write(b'{"kind": "phase", "na')
    events, offset = read_events(run.events_file)
    assert names(events) == ["one"]
    with open(run.events_file, "ab") as file:
        file.write(b'me": "two"}\n')
    events, end = read_events(run.events_file, offset)
    assert names(events) == ["two"]
    assert read_events(run.events_file, end) == ([], end)


def test_half_written_line_of_an_earlier_attempt_is_ended(run: Run) -> None:
    run.events_file.write_bytes(b'{"kind": "phase", "na')
    EventLog(run, 2).emit(PhaseStarted(name="after"))
    assert names(run.events()) == ["after"]


def test_damaged_and_unknown_lines_are_skipped(run: Run) -> None:
    good = b'{"kind": "phase", "name": "x"}\n'
    unknown = b'{"kind": "a kind of tomorrow"}\n{"kind": "phase"}\n{"kind": 3}\n{"kind": []}\n'
    run.events_file.write_bytes(good + b"\xff\xfe\n[1]\n3\n{}\n\n" + unknown + good)
    assert len(run.events()) == 2


def test_limit_bounds_each_read(run: Run) -> None:
    log = EventLog(run, 1)
    for number in range(50):
        log.emit(PhaseStarted(name=str(number)))
    read, offset = [], 0
    while True:
        events, after = read_events(run.events_file, offset, limit=300)
        if after == offset:
            break
        assert after - offset <= 300
        read += names(events)
        offset = after
    assert read == [str(number) for number in range(50)]


def test_missing_file_has_no_events(run: Run) -> None:
    assert run.events() == []
    assert read_events(run.events_file, 17) == ([], 17)


def test_partial_write_is_completed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = EventLog(run, 1), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    log.emit(PhaseStarted(name="whole"))
    assert names(run.events()) == ["whole"]


def test_events_of_a_full_disk_are_written_once_there_is_room(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write, parts = EventLog(run, 1), os.write, iter([7])

    def fill_up(fd: int, data: bytes) -> int:
        for size in parts:
            return write(fd, data[:size])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill_up)
        for number in range(300):
            log.emit(PhaseStarted(name=str(number)))
        assert run.events() == []
    log.emit(PhaseStarted(name="after"))
    assert names(run.events()) == [*map(str, range(100, 300)), "after"], "the newest ones"


def test_other_faults_of_the_disk_are_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(UserError, match="Input/output error"):
        EventLog(run, 1).emit(PhaseStarted(name="lost"))


def test_all_events_of_a_long_run_are_read(run: Run) -> None:
    line = b'{"kind": "phase", "name": "%s"}\n' % (b"x" * 2**16)
    with open(run.events_file, "wb") as file:
        file.writelines(line for _ in range(1100))  # over 64 MiB
    assert len(run.events()) == 1100


def test_run_that_is_being_deleted_is_not_listed(run: Run) -> None:
    run.write_state("finished")
    assert [listed.name for listed in store.list_runs(run.path.parent)] == [run.name]
    run.path.rename(run.path.with_name(f".deleted-{run.name}"))
    assert store.list_runs(run.path.parent) == []


def test_two_writers_do_not_mix_lines(run: Run) -> None:
    logs = [EventLog(run, number) for number in (1, 2)]
    threads = [
        threading.Thread(
            target=lambda log=log: [log.emit(PhaseStarted(name="字" * 500)) for _ in range(80)]
        )  # type: ignore[misc]
        for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(run.events()) == 160


def step(number: int, attempt: int) -> Event:
    return step_event(number, attempt=attempt)


def test_step_made_twice_keeps_the_last_attempt() -> None:
    saved = CheckpointSaved(step=2, path="x", seconds=1.0, attempt=1)
    phase = PhaseStarted(name="data", attempt=1)
    events = [step(1, 1), step(2, 1), saved, step(3, 1), phase, step(2, 2)]
    assert list(last_attempt_events(events, events)) == [
        step(1, 1),
        saved,
        step(3, 1),
        phase,
        step(2, 2),
    ]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3))))
def test_each_step_is_kept_from_one_attempt(made: list[tuple[int, int]]) -> None:
    events: list[Event] = [step_event(number, attempt=attempt) for number, attempt in made]
    kept = [event for event in last_attempt_events(events, events) if isinstance(event, Step)]
    assert {event.step for event in kept} == {number for number, _ in made}
    for event in kept:
        assert event.attempt == max(a for n, a in made if n == event.step)


@given(st.binary(max_size=300), st.integers(0, 50))
def test_any_bytes_are_read_without_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, limit: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    events, offset = read_events(path, 0, limit)
    assert 0 <= offset <= min(limit, len(data))
    assert all(isinstance(event, Event) for event in events)
