"""What this machine is: board, processor, GPU and memory, and which arithmetic it is fast at."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

# bf16 matrix instructions: AVX512-BF16 and AMX on x86, FEAT_BF16 on Arm.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Device:
    """A machine as training sees it; sizes in bytes."""

    kind: str  # "cuda" or "cpu"
    name: str
    board: str | None  # NVIDIA's board name on a Jetson
    cores: int
    memory_total: int  # of the GPU, or of the whole machine where the GPU shares it
    memory_available: int
    integrated: bool  # the GPU shares the machine's memory (every Jetson)
    fast_bf16: bool

    @property
    def shares_memory(self) -> bool:
        """Whether its memory is the machine's: a processor's, or that of a board's GPU."""
        return self.kind == "cpu" or self.integrated

    def precision(self, wanted: str) -> str:
        """The arithmetic to use: what is wanted, or for `auto` the fastest that is safe."""
        if wanted != "auto":
            return wanted
        if self.fast_bf16:
            return "bf16"
        return "fp16" if self.kind == "cuda" else "fp32"

    def as_json(self) -> dict[str, Any]:
        """For `report.json`."""
        return asdict(self)


def board_name(root: Path = Path("/")) -> str | None:
    """The Jetson's model as its device tree names it; None on any other machine."""
    for place in ("proc/device-tree/model", "tmp/nv_jetson_model"):
        try:
            name = (root / place).read_bytes().rstrip(b"\0\n").decode("utf-8", "ignore")
        except OSError:
            continue
        if "jetson" in name.lower() or "orin" in name.lower():
            return name
    return None


def cpu_name(cpuinfo: str) -> str:
    """The processor's marketing name out of the text of /proc/cpuinfo."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_has_bf16(cpuinfo: str) -> bool:
    """Whether the processor multiplies bf16 matrices in hardware."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return any(_BF16_FLAGS & set(line.split()) for line in lines)


def usable_cores() -> int:
    """Processor cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def probe() -> Device:
    """Looks at this machine. Imports torch, to ask for the GPU."""
    import torch

    memory = psutil.virtual_memory()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        integrated = bool(getattr(properties, "is_integrated", False))
        # On a board with one memory for both, the driver's "free" leaves out the page cache.
        free = memory.available if integrated else torch.cuda.mem_get_info(0)[0]
        return Device(
            kind="cuda",
            name=properties.name,
            board=board_name(),
            cores=usable_cores(),
            memory_total=properties.total_memory,
            memory_available=free,
            integrated=integrated,
            fast_bf16=properties.major >= 8,
        )
    cpuinfo = _read_cpuinfo()
    return Device(
        kind="cpu",
        name=cpu_name(cpuinfo),
        board=board_name(),
        cores=usable_cores(),
        memory_total=memory.total,
        memory_available=memory.available,
        integrated=False,
        fast_bf16=cpu_has_bf16(cpuinfo),
    )


def measure_flops(kind: str, precision: str) -> float:
    """Dense matrix products of this machine, FLOP/s: the best of a quarter of a second."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 4096 if kind == "cuda" else 512
    matrix = torch.full((size, size), 1 / size, dtype=dtype, device=kind)
    matrix @ matrix  # the first one also chooses a kernel, which takes longer
    started, best = time.perf_counter(), float("inf")
    while time.perf_counter() - started < 0.25:
        before = time.perf_counter()
        matrix @ matrix
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return ""
