"""Take the pictures of the page in README.md and docs: `picture_page.py RUN [RUN …]`.

The runs are copied into a folder of their own, the newest is shown and the others are compared with
it; `docs/images/page-TAB.png` are written.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SIZE: Any = {"width": 1280, "height": 900}
QUESTION = "为什么天空是蓝色的？"
SECONDS = 400  # for an answer of the base, which can be long


@contextmanager
def served(runs: Path) -> Iterator[str]:
    """Serve the page of a folder of runs; yield its address."""
    command = [sys.executable, "-m", "jetson_ft.cli", "webui", "--port", "0", "--runs", str(runs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().removeprefix("open: ").strip()
    finally:
        process.terminate()
        process.wait(20)


def picture_train(page: Any) -> None:
    """Wait for the plan of the recipe that is chosen at first."""
    page.locator("#plan .meter").first.wait_for()
    page.wait_for_timeout(1000)


def picture_runs(page: Any) -> None:
    """Show the newest run's overview, with the curves of the others."""
    page.locator("#run-detail canvas").first.wait_for()
    for swatch in page.locator("#run-list .swatch[aria-pressed=false]").all():
        swatch.click()
    page.wait_for_timeout(4000)


def picture_chat(page: Any) -> None:
    """Ask the newest adapter and its base one question."""
    page.get_by_label("Compare with").click()
    page.get_by_role("option").nth(1).click()
    page.wait_for_timeout(1500)
    page.locator("#chat-message textarea").fill(QUESTION)
    page.locator("#chat-message textarea").press("Enter")
    page.wait_for_timeout(3000)
    page.get_by_role("button", name="Send").wait_for()
    page.wait_for_timeout(1000)


PICTURES = {"train": picture_train, "runs": picture_runs, "chat": picture_chat}


def main() -> None:
    """Copy the runs, serve them, and photograph the tabs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--tab", choices=PICTURES, help="this picture only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for run in arguments.runs:
            shutil.copytree(run, Path(folder) / run.name)
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with served(Path(folder)) as address:
            for tab, show in PICTURES.items():
                if arguments.tab not in (None, tab):
                    continue
                page = browser.new_page(viewport=SIZE, color_scheme="light", locale="en-GB")
                page.set_default_timeout(SECONDS * 1000)
                page.goto(f"{address}#{tab}")
                show(page)
                page.screenshot(path=IMAGES / f"page-{tab}.png")
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
