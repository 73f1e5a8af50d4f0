"""A log with damaged lines, and one of hundreds of megabytes: read in bounded memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program import invoke
from run_folders import evaluated_event, make_run, step_event
from served import Served

from jetson_ft.errors import Message
from jetson_ft.events import Event, Exited, Failed, Step, Warned, to_json
from jetson_ft.runs import exit_status, monitor
from jetson_ft.runs.event_log import EventLog
from jetson_ft.runs.event_reader import iter_events, newest_event, read_events
from jetson_ft.runs.monitor import RunMonitor
from jetson_ft.runs.report import summary
from jetson_ft.runs.store import Run

pytestmark = pytest.mark.any_packages

LONG, SHORT = "20260102-000000-long", "20260101-000000-short"
MEGABYTES = 200


def line(event: Event, attempt: int = 1) -> bytes:
    return json.dumps({**to_json(event), "attempt": attempt}).encode() + b"\n"


def make_log(path: Path, megabytes: int) -> None:
    """Write one block of steps again and again, then the end of a failed attempt."""
    block = b"".join(line(step_event(number, total_steps=5000)) for number in range(1, 5000))
    failed = Failed(
        what="x", where="", fix="",
        messages={key: Message(f"because {key}").as_json() for key in ("what", "where", "fix")},
    )  # fmt: skip
    with open(path, "wb") as file:
        file.write(line(evaluated_event(0, 3.25)))
        for _ in range(megabytes * 10**6 // len(block) + 1):
            file.write(block)
        file.write(line(evaluated_event(5000, 2.5)) + line(failed) + line(Exited(code=1)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("long") / "runs"
    make_run(folder, SHORT)
    run = make_run(folder, LONG, "failed")
    make_log(run.events_file, MEGABYTES)
    with open(run.path / "log.txt", "wb") as file:
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last line\n")
    yield folder
    run.events_file.unlink()


# --- a log with damaged lines ------------------------------------------------------------------


@pytest.mark.promise(16)
def test_half_a_line_is_left_out_and_the_rest_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, SHORT, "stopped")
    with open(run.events_file, "ab") as file:
        file.write(b'{"kind": "step", "step": 99, "lo')
    assert "3/10" in invoke("runs", "list", "--runs", tmp_path)
    EventLog(run, 2).emit(step_event(4, total_steps=10))
    assert "4/10" in invoke("runs", "list", "--runs", tmp_path)
    assert [e.step for e in run.iter_events(Step)] == [1, 2, 3, 4]


@pytest.mark.promise(16)
def test_a_line_that_is_too_long_is_skipped(tmp_path: Path) -> None:
    """Between good ones, and as the last one; forwards and backwards; damaged or not."""
    run = make_run(tmp_path, SHORT)
    good = run.events_file.read_bytes()
    # The text is in the line twice: 1.5 MiB.
    warning = line(Warned.of_message(Message("w" * (3 << 18))))
    for end in (b"\n", b""):
        middle = b"x" * (5 << 20) + b"\n" + warning
        run.events_file.write_bytes(good + middle + good + b"y" * (3 << 20) + end)
        assert len(list(iter_events(run.events_file, Event))) == 8
        newest = newest_event(run.events_file, Step)
        assert newest and newest.step == 3
        assert newest_event(run.events_file, Warned) is None
    # Half of it in each of two blocks, both parts short enough.
    run.events_file.write_bytes(good + warning + good * ((1 << 18) // len(good)))
    assert newest_event(run.events_file, Warned) is None


@pytest.mark.promise(16)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.integers(1, 9).map(lambda n: line(step_event(n)))))
def test_any_bytes_between_lines_hide_no_line(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mixed.jsonl"
    path.write_bytes(b"\n".join(parts))
    steps = [part for part in parts[:-1] if part.startswith(b'{"schema"')]
    if parts and parts[-1].startswith(b'{"schema"'):
        steps.append(parts[-1])
    assert [line(event) for event in iter_events(path, Step)] == steps
    newest = newest_event(path, Step)
    assert (newest and line(newest)) == (steps[-1] if steps else None)


@pytest.mark.promise(16)
def test_commands_read_a_long_log_in_bounded_memory(root: Path) -> None:
    """The list, one run, the exit status and the report, each with a tenth of the log's size."""
    run = Run(root / LONG)
    tracemalloc.start()
    try:
        assert str(exit_status.last_error(run).what) == "because what"
        assert exit_status.recorded_exit_code(run) == 1
        assert monitor.summarize(run).step == 4999
        assert monitor.log_tail(run.path, 4000).endswith("the last line\n")
        RunMonitor().progress(run)
        list(read_events(run.events_file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES * 10**5


@pytest.mark.promise(16)
def test_the_program_lists_a_long_log_with_little_memory(root: Path) -> None:
    """The limit is of the address space, beyond what the program has after its imports."""
    code = (
        "import resource, sys, psutil; from jetson_ft.cli import main; "
        "import jetson_ft.runs.monitor, jetson_ft.cli.runs; "
        "limit = psutil.Process().memory_info().vms + (100 << 20); "
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", "list", "--runs", str(root)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4999/5000" in done.stdout and "3.250 → 2.500" in done.stdout


@pytest.mark.promise(16)
def test_a_report_of_a_long_log_is_made_in_bounded_memory(tmp_path: Path) -> None:
    run = make_run(tmp_path, LONG)
    make_log(run.events_file, 3)
    tracemalloc.start()
    try:
        assert sum(1 for _event in run.iter_events(Step)) > 10_000
        assert summary.summarize_sensors(run.iter_events(Event)) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


# --- on the page -------------------------------------------------------------------------------


@pytest.mark.promise(59)
def test_no_request_waits_while_a_long_log_is_read(root: Path) -> None:
    served = Served(root.parent, "--runs", str(root))
    try:
        url = f"{served.base}/live/en/runs"
        assert httpx.get(f"{url}/{SHORT}", timeout=20).status_code == 200
        details: list[tuple[float, str]] = []

        def open_long_run() -> None:
            for _ in range(3):
                started = time.monotonic()
                html = httpx.get(f"{url}/{LONG}", timeout=60).text
                details.append((time.monotonic() - started, html))
                time.sleep(1.05)  # a fragment is read again after a second

        thread = threading.Thread(target=open_long_run)
        thread.start()
        waits = []
        while thread.is_alive():
            for address in (f"{url}/{SHORT}", url, f"{served.base}/healthz"):
                started = time.monotonic()
                assert httpx.get(address, timeout=60).status_code == 200
                waits.append(time.monotonic() - started)
            time.sleep(0.05)
        thread.join()
    finally:
        served.close()
    assert max(waits) < 4.0
    assert max(seconds for seconds, _html in details) < 5.0
    shares = [html.partition("Reading the events: ")[2].partition("%")[0] for _, html in details]
    assert all(shares) and int(shares[0]) < 100 and shares != [shares[0]] * 3
    assert "Training loss" in details[0][1], "the newest figures are read from the log's end"


@pytest.mark.promise(59)
def test_a_call_of_another_run_does_not_wait_for_the_reader(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where one run's reader hangs, as on a dead network disk."""
    from jetson_ft.webui import fragments

    page, hang, begun = fragments.Fragments(root), threading.Event(), threading.Event()
    read = page._monitor.progress

    def progress(run: Run) -> monitor.RunProgress:
        if run.name == LONG:
            begun.set()
            assert hang.wait(20)
        return read(run)

    monkeypatch.setattr(page._monitor, "progress", progress)
    thread = threading.Thread(target=page.run_head, args=("en", LONG, "overview"))
    thread.start()
    try:
        assert begun.wait(10)
        started = time.monotonic()
        assert SHORT in page.run_head("en", SHORT, "overview")
        assert LONG in page.run_list("en", "", ())
        assert time.monotonic() - started < 5
        assert thread.is_alive()
    finally:
        hang.set()
        thread.join()


@pytest.mark.promise(59)
def test_the_whole_log_is_read_in_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path, LONG)
    make_log(run.events_file, 8)
    follower, sizes = RunMonitor(), []
    while not (progress := follower.progress(run)).is_complete:
        assert progress.offset <= progress.size
        sizes.append(progress.offset)
    assert sizes == sorted(sizes) and progress.offset == progress.size
    assert progress.curves["heldout_loss"].points() == [(0, 3.25), (5000, 2.5)]
    assert len(progress.curves["loss"].steps) == 4999
