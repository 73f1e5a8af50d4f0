"""Jetson Orin modules, to plan a run for a module that is not here.

Cores, clocks and memory: NVIDIA's data sheets of the Orin Nano, Orin NX and AGX Orin series, and
for Super mode the JetPack 6.2 release notes. No figure here was measured.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from jetson_ft.errors import UserError, _
from jetson_ft.hardware.detect import Device

# Operations per cycle and CUDA core. An Ampere multiprocessor has 128 CUDA cores and four tensor
# cores, which do 2048 dense FP16 or bf16 operations per cycle; fp32 doesn't use the tensor cores.
# The dense INT8 figures of the data sheets are twice the result.
_OPERATIONS = {"fp16": 16, "bf16": 16, "fp32": 2}
# Of 8 GiB about 5.2 GB are free for a run. For other modules: firmware and kernel use a share that
# grows with the memory, the system a fixed number of bytes.
_KERNEL_SHARE = 0.06
_SYSTEM_BYTES = 2.87e9


@dataclass(frozen=True)
class Board:
    """A module in its fastest power mode."""

    title: str
    memory_gib: int  # shared by processor and GPU
    cores: int  # of the processor
    cuda_cores: int
    clock: float  # highest of the GPU, Hz

    @property
    def name(self) -> str:
        """The name in commands: `orin-nano-8gb-super`."""
        return self.title.removeprefix("Jetson ").lower().replace(" ", "-")

    def flops(self, precision: str) -> float:
        """Return the peak of dense matrix products in FLOP/s; `fp16`, `bf16` or `fp32`."""
        return self.cuda_cores * self.clock * _OPERATIONS[precision]

    def device(self) -> Device:
        """Return the module as a device that training runs on."""
        memory = self.memory_gib * 2**30
        return Device(
            kind="cuda",
            name=self.title,
            board=self.title,
            cores=self.cores,
            memory_total=memory,
            memory_available=int(memory * (1 - _KERNEL_SHARE) - _SYSTEM_BYTES),
            integrated=True,
            fast_bf16=True,
        )


_BOARDS = (
    Board("Jetson Orin Nano 4GB", 4, 6, 512, 625e6),
    Board("Jetson Orin Nano 8GB", 8, 6, 1024, 625e6),
    Board("Jetson Orin Nano 8GB Super", 8, 6, 1024, 1020e6),
    Board("Jetson Orin NX 8GB", 8, 6, 1024, 765e6),
    Board("Jetson Orin NX 16GB", 16, 8, 1024, 918e6),
    Board("Jetson AGX Orin 32GB", 32, 8, 1792, 939e6),
    Board("Jetson AGX Orin 64GB", 64, 12, 2048, 1300e6),
)
BOARDS = {board.name: board for board in _BOARDS}
# The slowest module of each memory size in GiB. Of 4 GiB, 1 GB is free for a run: too little.
BOARD_CLASSES = {board.memory_gib: board for board in reversed(_BOARDS) if board.memory_gib >= 8}


def find_board(name: str) -> Board:
    """Return the module of that name; raise UserError where there is none."""
    if name in BOARDS:
        return BOARDS[name]
    near, known = difflib.get_close_matches(name, BOARDS, 1), ", ".join(BOARDS)
    fix = _("Did you mean {near}? Known: {known}.") if near else _("Known: {known}.")
    raise UserError(_("Device not found."), name, fix, near="".join(near), known=known)
