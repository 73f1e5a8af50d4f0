"""Processes, forked from one with the imports, that end as soon as something is unpickled."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import program
import whole_worker

UNPICKLED = 99  # exit code


def forbid() -> None:
    """End this process where a pickle names a class or function, or torch loads a file."""
    import torch

    def end(what: str) -> None:
        traceback.print_stack()
        print(f"unpickled: {what}", file=sys.stderr, flush=True)
        os._exit(UNPICKLED)

    def hook(event: str, arguments: Any) -> None:
        if event == "pickle.find_class":
            end(".".join(map(str, arguments)))

    sys.addaudithook(hook)
    torch.load = lambda *_a, **_k: end("torch.load")


def work(path: str, kill_at: str = "") -> None:
    """Be a worker, as `whole_worker.work`."""
    forbid()
    whole_worker.work(path, kill_at)


def command(arguments: list[str], output: str, typed: str = "") -> None:
    """Be `jetson-ft` with these arguments and this text on standard input."""
    forbid()
    reading, writing = os.pipe()
    os.write(writing, typed.encode())
    os.close(writing)
    os.dup2(reading, 0)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    program.main_in_fork(arguments, output)
