"""How much memory this process has taken at most, how much it could take, and when it wasn't
enough."""

from __future__ import annotations

import sys
from dataclasses import replace

import psutil

from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError

# The three forms it takes on a Jetson, and the CPU's.
_SIGNS = (
    "OutOfMemoryError",
    "CUDA out of memory",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    "NvMapMemAlloc",
    "can't allocate memory",
)


class OutOfMemory(UserError):
    """Training needed more than there was; `again`: it is to be tried once more, with less."""

    def __init__(self, what: str, where: str, fix: str, again: bool = False) -> None:
        super().__init__(what, where, fix)
        self.again = again


def is_out_of_memory(error: BaseException) -> bool:
    """In any of its forms."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(sign in text for sign in _SIGNS)


def with_own(device: Device, processes: int = 1) -> Device:
    """This machine with what this process holds counted as free: a plan is for all of it.

    Of a memory that several processes share, each gets its part; a GPU's own is not shared.
    """
    if not device.shares_memory:
        return device
    own = psutil.Process().memory_info().rss
    return replace(device, memory_available=device.memory_available // processes + own)


def peak_memory_bytes(device: str) -> int:
    """Peak bytes: allocated on the GPU by torch, or resident in RAM for a CPU run."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
