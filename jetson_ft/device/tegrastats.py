"""NVIDIA's tegrastats: one line a moment, written a little differently by every JetPack."""

from __future__ import annotations

import re

from jetson_ft.device.reading import Reading, rails, temperatures

_MIB = 2**20
# Every figure is taken with the unit behind it, so that a line cut short loses its last figure
# and doesn't report a part of it.
_RAM = re.compile(r"\bRAM (\d{1,9})/(\d{1,9})MB")
# 0% | 63%@621 | 63%@[621] | 12%@[1300,1300]; older ones name the GPU's clock without brackets
_GPU = re.compile(
    r"\bGR3D_FREQ (\d{1,3})%(?:@(?:\[(\d{1,6})(?:,\d+)*\]|(\d{1,6})(?=\s)))?", re.ASCII
)
_TEMPERATURE = re.compile(r"(?<![\w@])([A-Za-z]\w*)@(-?\d{1,4}(?:\.\d{1,6})?)C\b", re.ASCII)
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (\d{1,9})mW\b", re.ASCII)


def parse(line: str) -> Reading:
    """What a line says, be it whole, of another version, or cut off."""
    ram, gpu = _RAM.search(line), _GPU.search(line)
    clock = (gpu[2] or gpu[3]) if gpu else None
    return Reading(
        source="tegrastats",
        gpu_load=float(gpu[1]) if gpu else None,
        gpu_mhz=float(clock) if clock else None,
        memory_used=int(ram[1]) * _MIB if ram else None,
        memory_total=int(ram[2]) * _MIB if ram else None,
        temperatures=temperatures({name: float(v) for name, v in _TEMPERATURE.findall(line)}),
        rails=rails({name: float(value) for name, value in _RAIL.findall(line)}),
    )
