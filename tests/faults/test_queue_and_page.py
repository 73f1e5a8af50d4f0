"""Two starts at once, a form sent twice, a browser or a server that goes away."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from page_client import PageClient
from served import Served

from jetson_ft.runs import manager, store
from jetson_ft.runs.store import Run

pytestmark = pytest.mark.any_packages


class LightPage:
    """The page's server; runs that it starts are light ones."""

    def __init__(self, light_runs: Any) -> None:
        self.runs = light_runs
        light_runs.root.mkdir(parents=True)
        self.served = self.serve()

    def serve(self, port: int = 0) -> Served:
        return Served(self.runs.root.parent, "--runs", str(self.runs.root), port=port)

    def restart(self) -> None:
        """Kill the server, and start another one on its port."""
        port = self.served.port
        self.served.kill()
        self.served = self.serve(port)

    def start(self, ticket: str = "") -> Run:
        name = PageClient(self.served.base).start(ticket or uuid.uuid4().hex)
        return store.run_by_name(name, self.runs.root)


@pytest.fixture
def page(light_runs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[LightPage]:
    monkeypatch.setenv("LIGHT_RUNS", "endless")
    page = LightPage(light_runs)
    yield page
    page.served.kill()


@pytest.mark.promise(66)
@pytest.mark.promise(14)
def test_form_sent_twice_makes_one_run(page: LightPage) -> None:
    ticket = uuid.uuid4().hex
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _time: page.start(ticket).name, range(3)))
    assert len(set(runs)) == 1
    page.restart()
    assert page.start(ticket).name == runs[0]
    assert [run.name for run in store.list_runs(page.runs.root)] == runs[:1]
    assert page.start().name != runs[0]


@pytest.mark.promise(14)
def test_starts_from_two_tabs_train_one_after_the_other(page: LightPage) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _tab: page.start(), range(2))
    page.runs.until(lambda: list(page.runs.root.glob("*/worked-1")))
    waiting, trains = sorted((first, second), key=lambda run: (run.path / "worked-1").exists())
    assert page.runs.state_with_reason(waiting).state == "queued"
    assert "another run is training" in waiting.state().reason
    shown = page.served.get(f"/live/en/runs/{waiting.name}/head")
    assert shown and "next in the queue" in shown.text
    manager.stop(trains)
    assert page.runs.wait(trains, *store.ENDED_STATES) == "stopped"
    page.runs.worker(waiting)
    manager.stop(waiting)
    assert page.runs.wait(waiting, *store.ENDED_STATES) == "stopped"


@pytest.mark.promise(11)
def test_run_goes_on_when_the_browser_leaves_during_its_start(page: LightPage) -> None:
    client = PageClient(page.served.base)
    dependency = client.dependency("start")
    values = client.values(dependency)
    values[0] = uuid.uuid4().hex
    joined = {"data": values, "fn_index": dependency["id"], "session_hash": client.session}
    client.http.post("/gradio_api/queue/join", json=joined).raise_for_status()
    client.http.close()  # before any answer
    (run,) = page.runs.until(lambda: store.list_runs(page.runs.root))
    page.runs.worker(run)
    shown = httpx.get(f"{page.served.base}/live/en/runs/{run.name}/head").raise_for_status()
    assert run.name in shown.text and manager.reconcile_state(run) == "running"


@pytest.mark.promise(12)
def test_run_outlives_a_killed_server_and_stops_by_the_next(page: LightPage) -> None:
    run = page.start()
    page.runs.worker(run)
    page.restart()
    assert manager.reconcile_state(run) == "running"
    httpx.post(f"{page.served.base}/runs/{run.name}/stop").raise_for_status()
    assert page.runs.wait(run, *store.ENDED_STATES) == "stopped"


@pytest.mark.promise(14)
@pytest.mark.promise(8)
def test_two_commands_at_once_queue_and_ctrl_c_stops_each(
    light_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHT_RUNS", "endless")
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(light_runs.recipe().to_yaml())
    command = [sys.executable, "-m", "jetson_ft.cli", "train", str(recipe)]
    commands = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    runs = light_runs.until(
        lambda: len(all_runs := store.list_runs(light_runs.root)) == 2 and all_runs
    )
    (waiting,) = light_runs.until(lambda: [run for run in runs if run.state().reason])
    (trains,) = set(runs) - {waiting}
    assert "another run is training" in waiting.state().reason
    light_runs.worker(trains)
    for process in commands:
        process.send_signal(signal.SIGINT)
    outputs = [process.communicate(timeout=20)[0] for process in commands]
    assert [process.returncode for process in commands] == [130, 130]
    assert sum("another run is training" in output for output in outputs) == 1
    assert [run.state().state for run in runs] == ["stopped"] * 2
    assert not (waiting.path / "worked-1").exists()


@pytest.mark.promise(14)
def test_killed_and_stopped_runs_leave_the_queue_and_its_order(light_runs: Any) -> None:
    trains = light_runs.launch("endless")
    light_runs.worker(trains)
    killed, stopped, third, fourth = [
        light_runs.launch(label) for label in ("killed", "stopped", "third", "fourth")
    ]
    for run in (killed, stopped, third, fourth):
        light_runs.state_with_reason(run)
    light_runs.supervisor(killed).kill()
    manager.stop(stopped)
    assert light_runs.wait(stopped, *store.ENDED_STATES) == "stopped"
    assert manager.reconcile_state(trains) == "running"
    manager.stop(trains)
    for run in (third, fourth):
        assert light_runs.wait(run, *store.ENDED_STATES) == "finished"
    began = [float((run.path / "worked-1").read_text()) for run in (third, fourth)]
    assert began == sorted(began)
    assert manager.reconcile_state(killed) == "failed" and killed.state().resumable
    assert not list(light_runs.root.glob("*-[ks][it]*/worked-1"))
