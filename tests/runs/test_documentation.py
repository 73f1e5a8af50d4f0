"""The documentation of the run directory agrees with the code."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from jetson_ft.events import KINDS, Event

ROOT = Path(__file__).parents[2]


def test_table_of_events_is_up_to_date() -> None:
    command = [sys.executable, ROOT / "scripts" / "document_events.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_field_of_every_event_is_documented() -> None:
    common = {field.name for field in fields(Event)}
    for kind, cls in KINDS.items():
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            (text,) = getattr(hints[field.name], "__metadata__", ("",))
            assert field.name in common or text, f"{kind}: {field.name}"
