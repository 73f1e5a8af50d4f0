"""One Chromium for a module's tests, and what they do with its pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TABS = ("train", "runs", "chat", "inside", "device")
_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Return a Chromium without a window; skip the tests where there is none.

    Playwright keeps an event loop running in this thread while it is open: other modules' tests
    couldn't call `asyncio.run` if it stayed open for the session.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    sync_api.expect.set_options(timeout=20_000)  # other tests share the machine
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=_OPTIONS)
        yield opened
        opened.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """Return the module's Chromium; close the pages that the test opened in it."""
    yield chromium
    for context in chromium.contexts:
        context.close()


def open_tab(page: Any, served: Served, tab: str = "train", language: str = "en") -> None:
    """Open the page and one of its tabs; Gradio has made the tab's elements afterwards."""
    page.goto(f"{served.base}/{language}/")
    choose_tab(page, tab)


def choose_tab(page: Any, tab: str) -> None:
    """Choose a tab by its name in the address, which is the same in every language."""
    page.locator(f"[role=tab][data-tab-id={tab}]").click()
    page.locator("[role=tabpanel]:visible").first.wait_for()
