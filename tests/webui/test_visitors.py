"""What many runs and many visitors cost the page's server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from served import Served
from test_routes import make_run

from jetson_ft.runs.rundir import EventLog

pytestmark = pytest.mark.slow
VISITORS, SECONDS = 10, 10.0
REFRESH = 2.5  # seconds, as page.js has it


def opened(served: Served) -> float:
    """Seconds until a visitor has the page and the list of runs."""
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


def test_two_hundred_runs_open_as_fast_as_none(many: Served, none: Served) -> None:
    opened(many)  # each run is read once
    with_many, without = (min(opened(one) for _ in range(3)) for one in (many, none))
    assert with_many < without + 0.2


def visit(base: str, until: float, name: str) -> None:
    """Asks for what an open page asks for, as often as it does."""
    known: dict[str, str] = {}
    with httpx.Client(base_url=base) as client:
        while True:
            for path in (f"/live/en/runs?chosen={name}", f"/live/en/runs/{name}?chosen={name}"):
                headers = {"If-None-Match": known[path]} if path in known else {}
                answer = client.get(path, headers=headers)
                assert answer.status_code in (200, 304)
                known[path] = answer.headers["etag"]
            if time.monotonic() + REFRESH > until:
                return
            time.sleep(REFRESH)


def test_ten_visitors_cost_less_than_a_fiftieth_of_a_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "20260101-000000-x", steps=2000)
    served = Served(tmp_path)
    log, process = EventLog(run, 1), psutil.Process(served.process.pid)
    until = time.monotonic() + SECONDS
    visitors = [
        threading.Thread(target=visit, args=(served.base, until, run.name)) for _ in range(VISITORS)
    ]
    visit(served.base, time.monotonic(), run.name)  # what is read once
    before = sum(process.cpu_times()[:2])
    for visitor in visitors:
        visitor.start()
    for step in range(2001, 2100):
        log.emit("step", step=step, total_steps=9000, loss=2.0, lr=1e-3, grad_norm=1.0,
                 tokens_per_second=180.0, memory=2**31, seconds_left=60.0)  # fmt: skip
        time.sleep(5)  # the embedded model's steps take 6 seconds on two cores
        if time.monotonic() > until:
            break
    for visitor in visitors:
        visitor.join()
    spent = sum(process.cpu_times()[:2]) - before
    served.close()
    trainer = 2 * SECONDS  # both cores all the time
    assert spent < 0.02 * trainer
