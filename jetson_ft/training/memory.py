"""How much memory this process has taken at most."""

from __future__ import annotations

import sys


def peak_memory_bytes(device: str) -> int:
    """Peak bytes: allocated on the GPU by torch, or resident in RAM for a CPU run."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
