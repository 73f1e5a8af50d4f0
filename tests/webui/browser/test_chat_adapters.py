"""The Chat tab in a browser with two adapters in a real chat process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_browser import open_tab
from run_folders import copy_finished
from safetensors.torch import load_file, save_file
from served import Served

pytestmark = pytest.mark.slow(minutes=0.5)
TIMEOUT = 60_000  # milliseconds; other tests share the machine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Return a server of two runs on one base, whose adapters differ."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(Path(__file__).parents[2] / "versions" / "1" / "model", folder / "model")
    for name in ("20260101-000000-one", "20260102-000000-two"):
        run = copy_finished(folder / "runs", name)
        (run.path / "about.json").unlink()  # its title; now it is called as its folder
    weights = run.adapter / "adapter_model.safetensors"
    save_file({key: 8 * value for key, value in load_file(weights).items()}, weights)
    server = Served(folder)
    yield server
    server.kill()


def test_each_adapter_answers_as_it_does_alone(page: Any, served: Served) -> None:
    page.set_default_timeout(TIMEOUT)
    open_tab(page, served, "chat")
    page.locator("#chat-a label", has_text="two ·").wait_for()

    def ask() -> list[str]:
        page.get_by_role("textbox", name="Message").fill("What is the capital of France?")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for()
        page.get_by_role("button", name="Send", exact=True).wait_for()
        answers = page.locator("#chat-panes .bot-row[data-note*=tokens] .prose")
        return list(answers.all_text_contents())

    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("1")
    page.keyboard.press("Escape")
    (alone,) = ask()
    page.get_by_label("Compare with").click()
    page.get_by_role("option", name="one ·").click()
    page.locator("#chat-b label", has_text="one ·").wait_for()
    second, first = ask()
    assert second == alone != first
