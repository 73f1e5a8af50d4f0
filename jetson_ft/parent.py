"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_PROCESS = "JETSON_FT_PARENT"  # its number, in the environment of a command that it starts
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(variable: str = PARENT_PROCESS) -> None:
    """Let the kernel end this process when the one that started it dies.

    To the kernel the parent is the thread that started this process: it must wait for it.

    Args:
        variable: of the environment; has the number of that process.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ[variable]:  # it had died before
        os.kill(os.getpid(), signal.SIGKILL)
