"""Run programs with JSON output in a process of their own: the page's process loads no torch."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jetson_ft.child_process import PARENT_PROCESS, python_module
from jetson_ft.errors import Message, UserError, _
from jetson_ft.webui.limits import costly

_SECONDS = 900.0  # for a command; tokenizing gigabytes of rows takes minutes


def run_cli_json(*arguments: str) -> dict[str, Any]:
    """Run `jetson-ft` with these arguments; return the object that it prints.

    Raises:
        UserError: as `run_json`.
    """
    return run_json("jetson_ft.cli", *arguments)


def run_json(
    module: str,
    *arguments: str,
    text: str = "",
    started: Callable[[subprocess.Popen[str]], None] = lambda _process: None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run a module with these arguments; return the object that it prints.

    The process ends with this one.

    Args:
        text: its standard input.
        started: gets the process, to end it early.
        environment: variables besides this process's own.

    Raises:
        BusyError: as many such processes run as may.
        UserError: the program's own error, or its output to stderr where it printed no object.
    """
    command = python_module(module, *arguments)
    variables = {**os.environ, **environment, PARENT_PROCESS: str(os.getpid())}
    with (
        costly(),
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", env=variables,
        ) as process,
    ):  # fmt: skip
        started(process)
        try:
            stdout, stderr = process.communicate(text, timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise UserError(
                _("This took longer than {minutes:.0f} minutes and was ended."),
                fix=_("Use fewer rows, or run the command in a terminal."),
                minutes=_SECONDS / 60,
            ) from error
    try:
        result = json.loads(stdout)
    except ValueError:
        result = None
    if not isinstance(result, dict) or not result:
        nothing = Message(_("The command printed nothing."))
        raise UserError("{error}", error=stderr.strip() or nothing)
    if "error" in result:
        raise UserError.from_json(result["error"])
    return result
