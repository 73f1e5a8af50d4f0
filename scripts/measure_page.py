"""Measure how the page loads: `measure_page.py [ADDRESS]`, while `jetson-ft webui` serves it.

The first load of a browser, and a second one with what the first has kept; seconds are the least of
three browsers' loads, the rest is of the first browser.
"""

import argparse
import shutil
from dataclasses import dataclass
from typing import Any

from playwright.sync_api import sync_playwright

LOADS = 3
# Where the layout moves, and when Start is there.
OBSERVE = """
    window.shift = 0;
    new PerformanceObserver(list => list.getEntries().forEach(entry => {
        shift += entry.hadRecentInput ? 0 : entry.value;
    })).observe({ type: 'layout-shift', buffered: true });
    new MutationObserver(() => {
        if (document.querySelector('#train-tab button.primary'))
            window.usable ??= performance.now();
    }).observe(document, { childList: true, subtree: true });
"""
RESULT = """[
    usable - performance.getEntriesByType('navigation')[0].responseStart, shift
]"""


@dataclass(frozen=True)
class Load:
    """One load of the page.

    Attributes:
        fetched: addresses of the responses that came over the network, also from streams.
        received: their bytes, with headers.
        shift: cumulative layout shift.
        seconds: from the first byte of the document until Start is there.
    """

    fetched: list[str]
    received: float
    shift: float
    seconds: float


def measure_loads(browser: Any, address: str) -> tuple[Load, Load]:
    """Return the first load of a browser without a cache, and its second one."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, locale="en-GB")
    context.add_init_script(OBSERVE)
    first, second = _measure(context, address), _measure(context, address)
    context.close()
    return first, second


def _measure(context: Any, address: str) -> Load:
    page = context.new_page()
    network = context.new_cdp_session(page)
    network.send("Network.enable")
    addresses: dict[str, str] = {}
    received: dict[str, float] = {}
    network.on(
        "Network.responseReceived",
        lambda event: addresses.update({event["requestId"]: event["response"]["url"]}),
    )
    network.on(
        "Network.loadingFinished",
        lambda event: received.update({event["requestId"]: event["encodedDataLength"]}),
    )
    page.goto(address)
    page.wait_for_function("window.usable")
    page.wait_for_timeout(2000)  # for what moves late
    milliseconds, shift = page.evaluate(RESULT)
    page.close()
    fetched = [addresses[request] for request, size in received.items() if size]
    return Load(fetched, sum(received.values()), shift, milliseconds / 1000)


def main() -> None:
    """Print a table of both loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?", default="http://127.0.0.1:7860/en/")
    address = parser.parse_args().address
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        browsers = [measure_loads(browser, address) for _number in range(LOADS)]
        browser.close()
    print("| load | requests | kB | layout shift | seconds |\n|---|---|---|---|---|")
    for name, loads in zip(("first", "second"), zip(*browsers, strict=True), strict=True):
        load, seconds = loads[0], min(each.seconds for each in loads)
        size = f"{len(load.fetched)} | {load.received / 1000:.0f}"
        print(f"| {name} | {size} | {load.shift:.2f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
