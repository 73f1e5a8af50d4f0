"""Peak memory, available memory, and out-of-memory errors."""

from __future__ import annotations

import sys
from dataclasses import replace

import psutil

from jetson_ft.hardware.detect import Device

# In names and texts of exceptions: CUDA's three forms on a Jetson, and the CPU's.
_OOM_SIGNS = (
    "OutOfMemoryError",
    "CUDA out of memory",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    "NvMapMemAlloc",
    "can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is one of the forms that a lack of memory takes."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(sign in text for sign in _OOM_SIGNS)


def with_own_memory(device: Device, processes: int = 1) -> Device:
    """Return the device with this process's own memory counted as available, as plans cover it.

    Memory that `processes` share is divided; a GPU's own isn't shared.
    """
    if not device.shares_memory:
        return device
    own = psutil.Process().memory_info().rss
    # Libraries' pages are in `own`, and available too as page cache.
    available = min(device.memory_available // processes + own, device.memory_total)
    return replace(device, memory_available=available)


def peak_memory_bytes(device: str) -> int:
    """Return peak bytes: allocated on the GPU by torch, or resident in RAM for a CPU run."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
