"""Child processes: the command that starts one, and their end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_PROCESS = "JETSON_FT_PARENT"  # its number, in the environment of a command that it starts
PROGRESS_FILE = "JETSON_FT_PROGRESS"  # in the environment of a command: where it writes progress
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# With `-c`, and with `-m`, Python looks for modules in the current folder first ("" in `sys.path`).
# `-P` prevents that from Python 3.11 on.
_RUN_MODULE = (
    "import sys; sys.path[:] = filter(None, sys.path); del sys.argv[0]; import runpy; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def python_module(name: str, *arguments: str) -> list[str]:
    """Return the command of `python -m NAME ARGUMENTS`, safe in any current folder.

    A file there, such as `json.py` beside a downloaded model, would be imported in the place of the
    module of that name.
    """
    return [sys.executable, "-c", _RUN_MODULE, name, *arguments]


def end_with_parent(variable: str = PARENT_PROCESS) -> None:
    """Let the kernel end this process when the one that started it dies.

    To the kernel the parent is the thread that started this process: it must wait for it.

    Args:
        variable: of the environment; has the number of that process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ[variable]:  # it had died before
        os.kill(os.getpid(), signal.SIGKILL)
