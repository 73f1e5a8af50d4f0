"""What a command says in JSON, for those who may not load what it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from jetson_ft.errors import UserError


def ask(*arguments: str) -> dict[str, Any]:
    """The answer of `jetson-ft …`, from a process of its own: this one loads no torch.

    Raises:
        UserError: the command's own, or its last words where it came to no answer.
    """
    command = [sys.executable, "-m", "jetson_ft.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    found = _parsed(done.stdout)
    if "error" in found:
        raise UserError(**found["error"])
    if not found:
        raise UserError(done.stderr.strip() or "The command said nothing.")
    return found


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
