"""The document around Gradio's page, and the end of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jetson_ft.chat.client import ChatClient
from jetson_ft.webui import page
from jetson_ft.webui.security import AccessPolicy

HOST = "http://localhost"


def test_the_document_is_in_the_pages_language(tmp_path: Path) -> None:
    client = TestClient(page.make_app(tmp_path, AccessPolicy()), base_url=HOST)
    for language, tag, text in (("en", "en", "Fine-tune a"), ("zh_CN", "zh-CN", "微调")):
        response = client.get(f"/{language}/", headers={"Accept-Encoding": ""})
        html = response.text
        assert f'<html\n\tlang="{tag}"' in html
        assert text in html.partition("<gradio-app")[0], "there before Gradio has started"
        assert len(html.encode()) == int(response.headers["content-length"])


def test_the_stream_that_notices_closed_pages_is_not_opened(tmp_path: Path) -> None:
    client = TestClient(page.make_app(tmp_path, AccessPolicy()), base_url=HOST)
    assert client.get("/en/gradio_api/heartbeat/abc").status_code == 204


def test_a_closed_pages_reply_stops_and_its_session_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []
    pages: list[Any] = []
    build = page._build
    monkeypatch.setattr(page, "_build", lambda *args: pages.append(build(*args)) or pages[-1])
    monkeypatch.setattr(ChatClient, "stop", lambda _self, session="": stopped.append(session))
    client = TestClient(page.make_app(tmp_path, AccessPolicy()), base_url=HOST)
    kept = pages[0].state_holder.session_data
    for session in ("closed", "open"):
        _ = pages[0].state_holder[session]
    assert client.post("/closed/closed").status_code == 204
    assert stopped == ["closed"] and list(kept) == ["open"]
    assert client.post("/closed/unknown").status_code == 204


def test_the_sessions_that_are_kept_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that reports no end, as a crashed browser's, would stay for ever."""
    pages: list[Any] = []
    build = page._build
    monkeypatch.setattr(page, "_build", lambda *args: pages.append(build(*args)) or pages[-1])
    monkeypatch.setattr(page, "_MAX_SESSIONS", 3)
    page.make_app(tmp_path, AccessPolicy())
    for number in range(10):
        _ = pages[0].state_holder[str(number)]
    assert len(pages[0].state_holder.session_data) <= 4
