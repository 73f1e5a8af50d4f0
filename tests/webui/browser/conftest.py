"""A server for each module of browser tests, with runs in four states, and a page for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from run_folders import copy_finished
from served import Served
from workbench import LIGHT_PIPELINE, LightRuns, change_children


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightRuns]:
    """Return a finished, a failed, a running and a queued run; no new one trains."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        change_children(LIGHT_PIPELINE, folder, patch)
        light = LightRuns(folder)
        try:
            copy_finished(light.root, "20260101-000000-finished")
            light.wait(light.launch("refused"), "failed")
            light.worker(light.launch("endless"))
            light.wait(light.launch("waiting"), "queued")
            yield light
        finally:
            light.close()


@pytest.fixture(scope="module")
def served(runs: LightRuns) -> Iterator[Served]:
    """Return a server of those runs; its tests only add runs."""
    server = Served(runs.root.parent)
    yield server
    server.kill()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Return an English page of 1440 pixels; the test fails if a script of it does."""
    faults: list[str] = []
    opened = browser.new_page(viewport={"width": 1440, "height": 900}, locale="en-GB")
    opened.on("pageerror", lambda error: faults.append(str(error)))
    yield opened
    assert faults == []
