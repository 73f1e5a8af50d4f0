"""The Inside tab's form and its requests."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from run_folders import copy_finished
from starlette.testclient import TestClient
from workbench import wait_for

from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import UserError
from jetson_ft.files import write_json
from jetson_ft.inference.generate import Sampling
from jetson_ft.inside.views import VIEWS
from jetson_ft.recipe import Recipe
from jetson_ft.runs import store
from jetson_ft.runs.queue import QueueTicket
from jetson_ft.runs.store import Run
from jetson_ft.webui import api
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.tabs import inside
from jetson_ft.webui.tabs.chat_sampling import SLIDERS

VERSION = Path(__file__).parents[1] / "versions" / "1"
RUN = "20260101-000000-finished"
ASKED: dict[str, Any] = {"model": RUN, "options": {"text": "你好"}}


def client_of(chat: ChatClient, allowed: AllowedPaths = EVERY_PATH) -> TestClient:
    app = FastAPI()
    app.include_router(inside.router(chat.root, chat, allowed))
    app.add_exception_handler(UserError, api.error_response)
    return TestClient(app)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[ChatClient]:
    """Return the client of a chat's process, which ends with the test."""
    client = ChatClient(tmp_path)
    yield client
    client.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a finished run, in whose folder its base is."""
    finished = copy_finished(tmp_path, RUN)
    monkeypatch.chdir(VERSION)  # its recipe names its base as `model`
    assert finished.recipe().model == "model"
    return finished


@pytest.mark.parametrize("name", inside.PANELS)
def test_fields_are_options_of_the_views(name: str) -> None:
    panel = inside.PANELS[name]
    for view in panel.views:
        options = inspect.signature(VIEWS[view]).parameters
        assert set(panel.texts) <= set(options)
        assert not panel.sampling or "sampling" in options
    assert {option.name for option in SLIDERS} <= {field.name for field in fields(Sampling)}


@pytest.mark.parametrize("language, title", [("en", "Next token"), ("zh_CN", "下一个词元")])
def test_form_has_the_models_and_all_panels(
    chat: ChatClient, tmp_path: Path, language: str, title: str
) -> None:
    copy_finished(tmp_path, RUN)
    html = client_of(chat).get(f"/live/{language}/inside").text
    assert f'<option value="{RUN}" selected>' in html and '<option value="base"' in html
    assert html.count('name="panel"') == len(inside.PANELS)
    assert f"<span>{title}</span>" in html


def test_a_model_that_may_not_be_named_is_refused(chat: ChatClient, tmp_path: Path) -> None:
    client = client_of(chat, AllowedPaths((tmp_path,)))
    response = client.post("/inside/tokens", json={"model": "/etc", "options": {"text": "a"}})
    assert response.status_code == 422 and "/etc" in response.text


def test_a_view_is_answered_and_an_unknown_option_is_refused(chat: ChatClient, run: Run) -> None:
    client = client_of(chat)
    answer = client.post("/inside/attention", json=ASKED)
    assert answer.status_code == 200 and list(answer.json()["sides"]) == ["base", "adapter"]
    wrong = client.post(
        "/inside/attention", json={"model": RUN, "options": {"text": "你好", "depth": 1}}
    )
    assert wrong.status_code == 422 and "depth" in wrong.json()["what"]


def test_a_view_while_another_is_computed_is_refused(chat: ChatClient) -> None:
    asked = {"model": "base", "options": {"text": "a"}}
    with chat._lock:
        answer = client_of(chat).post("/inside/tokens", json=asked)
    assert answer.status_code == 422
    assert answer.json()["what"] == "Busy: the model is working for another client."


@pytest.mark.slow(minutes=0.2)
def test_the_models_memory_goes_to_a_run_that_starts(
    chat: ChatClient, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    client = client_of(chat)
    assert client.post("/inside/tokens", json=ASKED).status_code == 200
    training = store.create_run(Recipe(output_dir=str(tmp_path)), "beside")
    training.write_state("running")
    plan = {"peak_memory_bytes": 10**15, "parts": {"process": 0, "context": 0}}
    write_json(training.path / "plan.json", plan)
    slot = QueueTicket(1.0).try_take(training.path)
    assert slot
    with slot:
        wait_for(lambda: not chat._lives())
        answer = client.post("/inside/tokens", json=ASKED)
        assert answer.status_code == 422
        assert answer.json()["what"].startswith("Busy: a run is training. Beside it 0.0 GiB")


@pytest.mark.slow(minutes=0.1)
def test_the_process_ends_when_no_view_is_wanted(
    chat: ChatClient, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path; from jetson_ft.chat import server;"
        "server.IDLE_SECONDS = 1.0; server.ChatServer(Path(sys.argv[1])).run()"
    )
    monkeypatch.setattr(
        "jetson_ft.chat.client.python_module",
        lambda _module, root: [sys.executable, "-c", code, root],
    )
    assert client_of(chat).post("/inside/tokens", json=ASKED).status_code == 200
    wait_for(lambda: not chat._lives())
