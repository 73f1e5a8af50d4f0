"""The device: what the doctor finds here, and what mends it."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

from jetson_ft.errors import UserError
from jetson_ft.webui.commands import ask
from jetson_ft.webui.library import gr
from jetson_ft.webui.words import Words

_FRESH_SECONDS = 30.0
_MARKS = {"ok": "✓", "warning": "!", "failure": "✗"}


class Doctor:
    """Asked at most once in half a minute, by whoever looks; in both languages."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._found: dict[str, Any] = {}
        self._asked_at = float("-inf")
        self._lock = Lock()

    def findings(self) -> dict[str, Any]:
        """`jetson-ft doctor --json`, from a process of its own."""
        with self._lock:
            if time.monotonic() - self._asked_at > _FRESH_SECONDS:
                self._found = ask("doctor", "--json", "--runs", str(self._runs.absolute()))
                self._asked_at = time.monotonic()
            return self._found


def build(words: Words, doctor: Doctor, place: Any) -> None:
    """Puts the device into its place, a tab of the page; it is examined when somebody looks."""
    shown = gr.HTML(f'<p class="empty">{words("device.wait")}</p>', apply_default_css=False)
    again = gr.Button(words("device.again"), size="sm")

    def look() -> str:
        try:
            return findings_html(doctor.findings(), words)
        except UserError as error:
            return f'<div class="complaint" role="alert">{escape(words.error_text(error))}</div>'

    place.select(look, None, shown, concurrency_limit=None)
    again.click(look, None, shown, concurrency_limit=None)


def findings_html(found: dict[str, Any], words: Words) -> str:
    """A line for each thing that was looked at, and the verdict above them."""
    lines = "".join(_line(one, words.language) for one in found["checks"])
    verdict = words("device.works" if found["works"] else "device.fails")
    state = "finished" if found["works"] else "failed"
    return f'<p><span class="pill {state}">{verdict}</span></p><ul class="checks">{lines}</ul>'


def _line(check: dict[str, Any], language: str) -> str:
    title, said, fix = (escape(check[part][language]) for part in ("title", "found", "fix"))
    mend = f"<code>{fix}</code>" if fix else ""
    return (
        f'<li class="{check["status"]}"><b aria-label="{check["status"]}">'
        f"{_MARKS[check['status']]}</b><span>{title}</span><span>{said}{mend}</span></li>"
    )
