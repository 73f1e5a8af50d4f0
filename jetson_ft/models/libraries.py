"""Imports the libraries that a run or a chat stands on, in as little time as they allow."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any
from unittest import mock

_BASIS = "peft"  # what is imported last of torch, bitsandbytes, transformers and PEFT


def load(*others: str) -> None:
    """Imports those four, once, and `others` with them."""
    if _BASIS in sys.modules:
        return
    with _uncollected():
        _import_bitsandbytes()
        for name in ("transformers.models.auto.modeling_auto", _BASIS, *others):
            import_module(name)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps the garbage collector from what is made within, now and later.

    Four thousand modules make a million objects that all stay; looking through them again and
    again takes a seventh of the time, and later part of every full collection's.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _import_bitsandbytes() -> None:
    """Loads it without torch's compiler, a fifth of the time until the first step.

    bitsandbytes hands four slow stand-ins for missing kernels to `torch.compile` as it is
    imported (PEFT imports it, whatever the weights); CUDA and CPU have kernels of their own.
    """
    import torch

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return function or as_it_is

    # It tells programmers of kernels for other machines and of int8 on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Where it isn't installed, PEFT does without.
    with mock.patch.object(torch, "compile", as_it_is), suppress(ImportError):
        import bitsandbytes  # noqa: F401
