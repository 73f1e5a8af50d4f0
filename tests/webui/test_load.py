"""The cost of many runs and many open pages for the page's server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from run_folders import make_run, step_event
from served import Serve, Served

from jetson_ft.runs.event_log import EventLog

pytestmark = pytest.mark.slow
PAGES, SECONDS = 10, 10.0
REFRESH = 2.5  # seconds, as runs.js has it


def open_seconds(served: Served) -> float:
    """Return the seconds until the page and its list of runs have arrived."""
    started = time.monotonic()
    for path in ("/en/", "/live/en/runs"):
        answer = served.get(path)
        assert answer is not None and answer.status_code == 200
    return time.monotonic() - started


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Served]:
    for number in range(200):
        make_run(tmp_path / "runs", f"20260101-{number:06d}-x", steps=40)
    served = Served(tmp_path)
    yield served
    served.close()


@pytest.fixture
def none(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("none"))
    yield served
    served.close()


def test_a_page_with_two_hundred_runs_opens_as_fast_as_an_empty_one(
    many: Served, none: Served
) -> None:
    open_seconds(many)  # each run is read once
    with_many, without = (min(open_seconds(one) for _ in range(3)) for one in (many, none))
    assert with_many < without + 0.2


def poll(base: str, until: float, name: str) -> None:
    """Poll the fragments of an open page at its rate, until that monotonic time."""
    known: dict[str, str] = {}
    with httpx.Client(base_url=base) as client:
        while True:
            is_changed = False
            for path in (
                f"runs?chosen={name}&drawn={name}", f"runs/{name}/head?view=overview",
                f"runs/{name}?view=overview&drawn={name}", f"curves?view=overview&drawn={name}",
            ):  # fmt: skip
                if path.startswith("curves") and not is_changed:
                    continue
                headers = {"If-None-Match": known[path]} if path in known else {}
                answer = client.get(f"/live/en/{path}", headers=headers)
                assert answer.status_code in (200, 304)
                known[path], is_changed = answer.headers["etag"], answer.status_code == 200
            if time.monotonic() + REFRESH > until:
                return
            time.sleep(REFRESH)


def test_ten_open_pages_take_less_than_two_percent_of_a_training(
    serve: Serve, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "runs", "20260101-000000-x", steps=2000)
    served = serve()
    log, process = EventLog(run, 1), psutil.Process(served.process.pid)
    until = time.monotonic() + SECONDS
    pages = [
        threading.Thread(target=poll, args=(served.base, until, run.name)) for _ in range(PAGES)
    ]
    poll(served.base, time.monotonic(), run.name)  # what is read once
    before = sum(process.cpu_times()[:2])
    for page in pages:
        page.start()
    for step in range(2001, 2100):
        log.emit(step_event(step, total_steps=9000))
        time.sleep(5)  # the embedded model's steps take 6 seconds on two cores
        if time.monotonic() > until:
            break
    for page in pages:
        page.join()
    spent = sum(process.cpu_times()[:2]) - before
    trainer = 2 * SECONDS  # both cores all the time
    assert spent < 0.02 * trainer
