"""Take the pictures of docs/inside.md: `picture_inside.py [RUN] [--runs FOLDER]`.

The commands are those of the page itself: each line `jetson-ft inspect … --html NAME.html` is run,
and panels of what it writes become `docs/images/inside-PICTURE.png`.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MAX_BYTES = 150_000
WIDTH = 1100
# Picture -> the page's name, the heading of the view, those of its first and its last panel.
PICTURES = {
    "tokens": ("tokens", "Tokens", "The text as tokens", "Characters in several tokens"),
    "trained": ("trained", "Tokens", "The text as tokens", ""),
    "attention": ("attention", "Attention", "Attention from token to token", ""),
    "example": ("attention", "Attention, by numbers", "1. Query", "2. Scores become shares"),
    "next": ("next", "Next token", "The likeliest tokens", ""),
    "reply": ("reply", "A reply, token by token", "The reply", "Where the two disagree"),
    "in-context": ("in-context", "Examples in the prompt", "No example", "3 examples"),
    "numbers": ("numbers", "Numbers", "Weights by part and format", "Memory of training"),
    "quantization": ("numbers", "Quantization", "nf4's 16 levels", ""),
    "adapter": ("adapter", "The adapter", "The change of each layer", "How many directions"),
}


def main() -> None:
    """Run the commands, then photograph the panels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="latest")
    parser.add_argument("--runs", default="runs", help="folder that holds the runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for command in commands():
            words = [options.run if word == "latest" else word for word in command[1:]]
            words[-1] = str(Path(folder) / words[-1])
            print("jetson-ft", *words)
            program = [sys.executable, "-m", "jetson_ft.cli", *words, "--runs", options.runs]
            subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        take_pictures(Path(folder))


def commands() -> list[list[str]]:
    """Return the words of the page's commands that write a file."""
    lines = (DOCS / "inside.md").read_text("utf-8").splitlines()
    split = (shlex.split(line) for line in lines if line.startswith("jetson-ft inspect "))
    return [words for words in split if "--html" in words]


def take_pictures(folder: Path) -> None:
    """Write a picture of the panels in `PICTURES`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, locale="en-GB")
        for name, (file, heading, first, last) in PICTURES.items():
            page.goto((folder / f"{file}.html").as_uri())
            page.wait_for_timeout(300)
            boxes = [panel(page, heading, title).bounding_box() for title in (first, last or first)]
            left, top = boxes[0]["x"] - 8, boxes[0]["y"] - 8
            right = max(box["x"] + box["width"] for box in boxes) + 8
            bottom = max(box["y"] + box["height"] for box in boxes) + 8
            clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
            path = DOCS / "images" / f"inside-{name}.png"
            page.screenshot(path=path, clip=clip, full_page=True)
            if path.stat().st_size > MAX_BYTES:
                sys.exit(f"{path}: {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
        browser.close()


def panel(page: Any, heading: str, title: str) -> Any:
    """Return the panel with a title in the view with a heading."""
    name = page.get_by_role("heading", level=2, name=heading, exact=True)
    view = page.locator("article.inside").filter(has=name)
    return view.locator(".panel").filter(has=page.get_by_role("heading", level=3, name=title))


if __name__ == "__main__":
    main()
