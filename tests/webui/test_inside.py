"""The Inside tab's form and its requests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from run_folders import copy_finished
from starlette.testclient import TestClient

from jetson_ft.chat.client import ChatClient
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling
from jetson_ft.inside.views import VIEWS
from jetson_ft.webui import api
from jetson_ft.webui.allowed_paths import EVERY_PATH, AllowedPaths
from jetson_ft.webui.tabs import inside
from jetson_ft.webui.tabs.chat_sampling import SLIDERS

VERSION = Path(__file__).parents[1] / "versions" / "1"
RUN = "20260101-000000-finished"


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


def test_a_view_is_answered_and_an_unknown_option_is_refused(
    chat: ChatClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_finished(tmp_path, RUN)
    monkeypatch.chdir(VERSION)  # the run's recipe names its base as `model`
    assert run.recipe().model == "model"
    client = client_of(chat)
    asked: dict[str, Any] = {"model": RUN, "options": {"text": "你好"}}
    answer = client.post("/inside/attention", json=asked)
    assert answer.status_code == 200 and list(answer.json()["sides"]) == ["base", "adapter"]
    wrong = client.post(
        "/inside/attention", json={"model": RUN, "options": {"text": "你好", "depth": 1}}
    )
    assert wrong.status_code == 422 and "depth" in wrong.json()["what"]
