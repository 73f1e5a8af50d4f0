"""Run commands with JSON output in a process of their own: the page's process loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from jetson_ft.errors import Message, UserError, _


def run_cli_json(*arguments: str) -> dict[str, Any]:
    """Run `jetson-ft` with these arguments; return the object that it prints.

    Raises:
        UserError: the command's own error, or its output to stderr where it printed no object.
    """
    command = [sys.executable, "-m", "jetson_ft.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        result = None
    if not isinstance(result, dict) or not result:
        nothing = Message(_("The command printed nothing."))
        raise UserError("{error}", error=done.stderr.strip() or nothing)
    if "error" in result:
        raise UserError.from_json(result["error"])
    return result
