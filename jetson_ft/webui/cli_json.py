"""Run commands with JSON output in a process of their own: the page's process loads no torch."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from jetson_ft.child_process import PARENT_PROCESS, python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.webui.limits import costly

_SECONDS = 900.0  # for a command; tokenizing gigabytes of rows takes minutes


def run_cli_json(*arguments: str) -> dict[str, Any]:
    """Run `jetson-ft` with these arguments; return the object that it prints.

    The process ends with this one.

    Raises:
        BusyError: as many such processes run as may.
        UserError: the command's own error, or its output to stderr where it printed no object.
    """
    command = python_module("jetson_ft.cli", *arguments)
    environment = {**os.environ, PARENT_PROCESS: str(os.getpid())}
    with costly():
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", env=environment, timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise UserError(
                _("This took longer than {minutes:.0f} minutes and was ended."),
                fix=_("Use fewer rows, or run the command in a terminal."),
                minutes=_SECONDS / 60,
            ) from error
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
