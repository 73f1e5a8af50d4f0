"""Which recipe to run when nobody named one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from jetson_ft import hub

_GPU_NODES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0/ctrl")


def has_cuda_gpu() -> bool:
    """Whether torch can use a GPU; torch is only loaded where the system shows one."""
    if not any(Path(node).exists() for node in _GPU_NODES) and not shutil.which("nvidia-smi"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def choose_recipe(
    has_gpu: Callable[[], bool] = has_cuda_gpu, hub_reachable: Callable[[], bool] = hub.reachable
) -> tuple[str, str]:
    """(name of a shipped recipe, one line on why)."""
    if not has_gpu():
        return "quickstart-zh", "no CUDA GPU here, so the embedded model on the CPU"
    if not hub_reachable():
        return "quickstart-zh", f"a GPU, but {hub.endpoint()} is out of reach: the embedded model"
    return "phi-1_5-zh-quick", "a CUDA GPU and the hub in reach: Phi-1.5, at most 60 minutes"
