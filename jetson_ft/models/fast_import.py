"""Import the libraries that training and chat need, in as little time as they allow."""

from __future__ import annotations

import gc
import logging
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any
from unittest import mock


def import_libraries(*others: str) -> None:
    """Import torch, bitsandbytes, transformers, PEFT and `others`, once.

    Four thousand modules create a million permanent objects. They are excluded from garbage
    collection: scanning them repeatedly takes a seventh of the import's time, and later a part of
    every full collection's.
    """
    if "peft" in sys.modules:
        return

    def unchanged(function: Any = None, **_: Any) -> Any:
        return function or unchanged

    # bitsandbytes logs notes for programmers about kernels for other machines and int8 on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch

        # On import, bitsandbytes passes four slow replacements of missing kernels to torch's
        # compiler, which takes a fifth of the time until the first step. CUDA and CPU have kernels
        # of their own. PEFT imports bitsandbytes for any weights, or does without.
        with mock.patch.object(torch, "compile", unchanged), suppress(ImportError):
            import bitsandbytes  # noqa: F401
        for name in ("transformers.models.auto.modeling_auto", "peft", *others):
            import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
