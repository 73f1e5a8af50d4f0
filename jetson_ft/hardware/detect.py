"""This machine: board, processor, GPU, memory, and the precision that it is fast at."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from jetson_ft.errors import UserError
from jetson_ft.files import cache_root, read_json, write_json
from jetson_ft.hardware import cgroup, jetpack
from jetson_ft.hardware.sensors.sysfs import read_text

# Device files of a Jetson that CUDA opens. Which of them exist differs between versions of JetPack.
JETSON_MEMORY_NODE = "dev/nvmap"
_JETSON_GPU_NODES = ["dev/nvhost-gpu", "dev/nvgpu/igpu0/ctrl"]  # either means that there is a GPU
_OTHER_NODES = ["dev/nvhost-ctrl-gpu", "dev/dri/renderD128"]
JETSON_NODES = [JETSON_MEMORY_NODE, *_JETSON_GPU_NODES, *_OTHER_NODES]
# bf16 matrix instructions: AVX512-BF16 and AMX on x86, FEAT_BF16 on Arm.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Device:
    """A machine's properties that training depends on; sizes in bytes."""

    kind: str  # "cuda" or "cpu"
    name: str
    board: str | None  # name of the Jetson
    cores: int
    memory_total: int  # of the GPU, or of the machine (its control group) where the GPU shares it
    memory_available: int
    integrated: bool  # the GPU shares the machine's memory (every Jetson)
    fast_bf16: bool
    memory_limited: bool = False  # memory_total is the limit of a control group

    @property
    def shares_memory(self) -> bool:
        """Whether it computes in the machine's memory: a processor, or the GPU of a board."""
        return self.kind == "cpu" or self.integrated

    def precision(self, setting: str) -> str:
        """Return the setting itself, or for `auto` the fastest precision that is safe."""
        if setting != "auto":
            return setting
        if self.fast_bf16:
            return "bf16"
        return "fp16" if self.kind == "cuda" else "fp32"


def board_name(root: Path = Path("/")) -> str | None:
    """Return the name of the Jetson; None on any other machine.

    A container may hide the device tree, which has the name, and show the release file.
    """
    for path in ("proc/device-tree/model", "tmp/nv_jetson_model"):
        name = read_text(root / path)
        if "jetson" in name.lower() or "orin" in name.lower():
            return name
    return "NVIDIA Jetson" if jetpack.read_l4t(root) else None


def has_nvidia_driver(root: Path, path: str | None = None) -> bool:
    """Return whether the system shows the driver of a discrete NVIDIA GPU.

    WSL has no device file, but nvidia-smi, which is searched for in `path` (by default PATH).
    """
    return (root / "dev/nvidia0").exists() or bool(shutil.which("nvidia-smi", path=path))


def has_cuda_gpu(root: Path = Path("/")) -> bool:
    """Return whether torch can use a GPU; import torch only where the system shows one."""
    if not has_nvidia_driver(root) and not any((root / n).exists() for n in _JETSON_GPU_NODES):
        return False
    import torch

    return bool(torch.cuda.is_available())


def cpu_name(cpuinfo: str) -> str:
    """Return the processor's marketing name, from the text of /proc/cpuinfo."""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def cpu_has_bf16(cpuinfo: str) -> bool:
    """Return whether the processor multiplies bf16 matrices in hardware."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return any(_BF16_FLAGS & set(line.split()) for line in lines)


def usable_cores() -> int:
    """Return the number of processor cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def package_version(name: str) -> str:
    """Return the version of a Python package; empty where it isn't installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def detect_cpu() -> Device:
    """Return this machine without its GPU; torch isn't imported.

    The limit of a control group (`docker run -m`) limits its memory.
    """
    memory, cpuinfo = psutil.virtual_memory(), read_text(Path("/proc/cpuinfo"))
    limit = cgroup.memory_limit()
    return Device(
        kind="cpu",
        name=cpu_name(cpuinfo),
        board=board_name(),
        cores=usable_cores(),
        memory_total=min(memory.total, limit.limit),
        memory_available=min(memory.available, limit.available),
        integrated=False,
        fast_bf16=cpu_has_bf16(cpuinfo),
        memory_limited=limit.limit < memory.total,
    )


def detect_device() -> Device:
    """Return this machine, with its first GPU if torch can use it. Imports torch.

    The limit of a control group limits all memory except that of a discrete GPU.
    """
    import torch

    device = detect_cpu()
    if not torch.cuda.is_available():
        return device
    gpu, limit = torch.cuda.get_device_properties(0), cgroup.memory_limit().limit
    integrated = bool(getattr(gpu, "is_integrated", False))
    # Where the memory is shared, the driver counts the page cache as used.
    free = device.memory_available if integrated else torch.cuda.mem_get_info(0)[0]
    return replace(
        device,
        kind="cuda",
        name=gpu.name,
        memory_total=min(gpu.total_memory, limit) if integrated else gpu.total_memory,
        memory_available=free,
        integrated=integrated,
        fast_bf16=gpu.major >= 8,
        memory_limited=integrated and limit < gpu.total_memory,
    )


def estimate_device(root: Path = Path("/")) -> Device:
    """Return this machine as its system and its driver describe it; torch isn't imported.

    It has a GPU where the driver shows one, whether or not the installed torch can use it.
    """
    device = detect_cpu()
    if any((root / node).exists() for node in _JETSON_GPU_NODES):
        name = device.board or device.name
        return replace(device, kind="cuda", name=name, integrated=True, fast_bf16=True)
    if not has_nvidia_driver(root):
        return device
    import pynvml

    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        major, _minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
        name = str(pynvml.nvmlDeviceGetName(gpu))
    except pynvml.NVMLError:  # a driver without its library, or without its GPU
        return device
    return replace(
        device, kind="cuda", name=name, memory_total=memory.total,
        memory_available=memory.free, fast_bf16=major >= 8, memory_limited=False,
    )  # fmt: skip


def measure_flops(kind: str, precision: str) -> float:
    """Return FLOP/s of dense matrix products: the best of a quarter of a second.

    `remembered_flops` returns the result to processes without torch.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 4096 if kind == "cuda" else 512
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=kind)
    matrix @ matrix  # the first product takes longer, because it selects a kernel
    started, best = time.perf_counter(), float("inf")
    while time.perf_counter() - started < 0.25:
        before = time.perf_counter()
        matrix @ matrix
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    flops = 2.0 * size**3 / best
    with contextlib.suppress(UserError, OSError):  # it is for estimates only
        write_json(_flops_file(), {**_all_remembered(), f"{kind} {precision}": flops})
    return flops


def remembered_flops(kind: str, precision: str) -> float | None:
    """Return the FLOP/s that `measure_flops` last measured on this machine; None: never."""
    flops = _all_remembered().get(f"{kind} {precision}")
    return flops if isinstance(flops, float) and flops > 0 else None


def _flops_file() -> Path:
    return cache_root() / "flops.json"


def _all_remembered() -> dict[str, Any]:
    with contextlib.suppress(UserError):
        if isinstance(flops := read_json(_flops_file()), dict):
            return flops
    return {}
