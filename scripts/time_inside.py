"""Time the panels of the Inside tab: `time_inside.py [RUN] [--runs FOLDER]`.

Each panel's views are computed by the chat's process, as for the page, with the texts that its form
has at first; the model is loaded before. Prints the medians of three: seconds, and
CPU seconds of all threads.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from jetson_ft.chat.client import ChatClient
from jetson_ft.inside.examples import CAPITALS
from jetson_ft.webui.tabs.inside import PANELS

ROUNDS = 3


def time_panels(
    show: Callable[[str, dict[str, Any]], object], process: psutil.Process
) -> dict[str, tuple[float, float]]:
    """Return each panel's seconds, and those that the process computed, over all its threads.

    Args:
        show: computes a view with its options in the process.
    """

    def now() -> tuple[float, float]:
        used = process.cpu_times()
        return time.monotonic(), used.user + used.system

    seconds = {}
    for name, panel in PANELS.items():
        texts: dict[str, Any] = {key: text for key, text in panel.texts.items() if text}
        options = texts | ({"examples": CAPITALS} if "examples" in texts else {})
        rounds = []
        for _round in range(ROUNDS):
            before = now()
            for view in panel.views:
                show(view, options)
            rounds.append([after - start for start, after in zip(before, now(), strict=True)])
        wall, computed = (median(values) for values in zip(*rounds, strict=True))
        seconds[name] = wall, computed
    return seconds


def main() -> None:
    """Load the run's model, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="latest")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder that holds the runs"
    )
    arguments = parser.parse_args()
    client = ChatClient(arguments.runs)
    try:
        client.view(arguments.run, "tokens", {"text": "a"})
        process = client._process
        assert process
        seconds = time_panels(
            lambda view, options: client.view(arguments.run, view, options),
            psutil.Process(process.pid),
        )
    finally:
        client.close()
    print("| panel | seconds | CPU seconds |\n|---|---|---|")
    for name, (wall, computed) in seconds.items():
        print(f"| {PANELS[name].title} | {wall:.2f} | {computed:.2f} |")


if __name__ == "__main__":
    main()
