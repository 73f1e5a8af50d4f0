"""The Jetson Orin modules a job can be planned for without having one.

Cores, clocks, memory and power modes: NVIDIA's data sheets of the Orin Nano, Orin NX and AGX
Orin series, and for Super mode the JetPack 6.2 release notes. No figure here was measured.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from jetson_ft.device.probe import Device
from jetson_ft.errors import UserError

# An Ampere multiprocessor has 128 CUDA cores and four tensor cores, which make 2048 dense FP16
# operations a cycle: 16 a CUDA core (bf16 the same, fp32 without them 2). The data sheets'
# dense INT8 figures are twice what this formula gives.
_OPERATIONS = {"fp16": 16, "bf16": 16, "fp32": 2}
# Of 8 GiB about 5.2 GB were found free for a job. Taken from that for every module: firmware
# and kernel keep a share that grows with the memory, the rest of the system a fixed amount.
_KERNEL_SHARE = 0.06
_SYSTEM = 2.87e9


@dataclass(frozen=True)
class Board:
    """A module at its fastest power mode; bytes, bytes per second, Hz, watts."""

    name: str
    title: str
    memory: int  # shared by processor and GPU
    cuda_cores: int
    clock: float  # of the GPU, at most
    bandwidth: float
    power_modes: tuple[str, ...]

    @property
    def usable(self) -> int:
        """Bytes that a run can have beside the system (a rule from one known module)."""
        return int(self.memory * (1 - _KERNEL_SHARE) - _SYSTEM)

    def flops(self, precision: str) -> float:
        """Peak of dense matrix products, FLOP/s, in `fp16`, `bf16` or `fp32`."""
        return self.cuda_cores * self.clock * _OPERATIONS[precision]

    def device(self) -> Device:
        """The module as training would see it."""
        return Device(
            kind="cuda",
            name=self.title,
            board=self.title,
            cores=6,
            memory_total=self.memory,
            memory_available=self.usable,
            integrated=True,
            fast_bf16=True,
        )


_GIB = 2**30
BOARDS = {
    board.name: board
    for board in (
        Board("orin-nano-4gb", "Jetson Orin Nano 4GB", 4 * _GIB, 512, 625e6, 34e9, ("7", "10")),
        Board("orin-nano-8gb", "Jetson Orin Nano 8GB", 8 * _GIB, 1024, 625e6, 68e9, ("7", "15")),
        Board(
            "orin-nano-8gb-super", "Jetson Orin Nano 8GB Super",
            8 * _GIB, 1024, 1020e6, 102e9, ("15", "25", "MAXN_SUPER"),
        ),
        Board(
            "orin-nx-8gb", "Jetson Orin NX 8GB",
            8 * _GIB, 1024, 765e6, 102.4e9, ("10", "15", "20"),
        ),
        Board(
            "orin-nx-16gb", "Jetson Orin NX 16GB",
            16 * _GIB, 1024, 918e6, 102.4e9, ("10", "15", "25"),
        ),
        Board(
            "agx-orin-32gb", "Jetson AGX Orin 32GB",
            32 * _GIB, 1792, 939e6, 204.8e9, ("15", "30", "40", "MAXN"),
        ),
        Board(
            "agx-orin-64gb", "Jetson AGX Orin 64GB",
            64 * _GIB, 2048, 1300e6, 204.8e9, ("15", "30", "50", "MAXN"),
        ),
    )
}  # fmt: skip


def find(name: str) -> Board:
    """The module of that name.

    Raises:
        UserError: none is called so.
    """
    if name in BOARDS:
        return BOARDS[name]
    near = difflib.get_close_matches(name, BOARDS, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError("There is no such device.", name, f"{hint}Known: {', '.join(BOARDS)}.")
