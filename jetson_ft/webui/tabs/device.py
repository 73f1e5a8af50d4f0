"""The Device tab: the doctor's findings."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from jetson_ft.errors import UserError, _
from jetson_ft.webui.cli_json import run_cli_json
from jetson_ft.webui.gradio_import import gr
from jetson_ft.webui.render import Locale, error_html, render

_CACHE_SECONDS = 30.0


class Doctor:
    """The doctor's findings, cached for all pages."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._result: dict[str, Any] = {}
        self._examined_at = float("-inf")
        self._lock = Lock()

    def findings(self, max_age: float = _CACHE_SECONDS) -> dict[str, Any]:
        """Return the output of `jetson-ft doctor --json`, at most `max_age` seconds old.

        Concurrent calls share one examination.
        """
        oldest = time.monotonic() - max_age
        with self._lock:
            if self._examined_at < oldest:
                runs = str(self._runs.absolute())
                self._result = run_cli_json("doctor", "--json", "--runs", runs)
                self._examined_at = time.monotonic()
            return self._result


def build(t: Locale, doctor: Doctor, tab: Any) -> None:
    """Add the tab's components; the machine is examined when the tab is opened."""
    wait = t(_("Examining this machine …"))
    html = gr.HTML(f'<p class="empty">{wait}</p>', apply_default_css=False)
    again = gr.Button(t(_("Examine again")), size="sm")

    def examine(max_age: float = _CACHE_SECONDS) -> str:
        try:
            return render("findings.jinja", t, **doctor.findings(max_age))
        except UserError as error:
            return error_html(error, t)

    # Those that wait for an examination hold no threads, which the rest of the page needs.
    tab.select(examine, None, html, concurrency_limit=2)
    again.click(partial(examine, 0.0), None, html, concurrency_limit=2)
