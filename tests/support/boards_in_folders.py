"""Machines as the files that Linux and JetPack show of them, for tests without a board."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Board:
    """What differs between modules and between versions of JetPack."""

    model: str  # in the device tree; empty: not a Jetson
    release: str  # first line of /etc/nv_tegra_release
    memory: int  # MiB
    rails: dict[str, tuple[int, int]]  # millivolts, milliamperes
    gpu: str = "17000000.gpu"  # the GPU's folder below devfreq
    load: str = "sys/devices/platform/gpu.0/load"  # its load
    modes: dict[int, str] = field(default_factory=dict)
    mode: int = 0
    line: str = ""  # that tegrastats writes


NANO = Board(
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: "
    "Wed Jan  8 01:49:37 UTC 2025",
    7620,
    {"VDD_IN": (5008, 2400), "VDD_CPU_GPU_CV": (5008, 900), "VDD_SOC": (5008, 500)},
    modes={0: "15W", 1: "25W", 2: "MAXN_SUPER"},
    mode=2,
    line="11-26-2026 10:00:01 RAM 3100/7620MB (lfb 8x2MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [12%@729,9%@729,8%@729,7%@729,6%@729,5%@729] EMC_FREQ 40%@2133 GR3D_FREQ 97%@[1015] "
    "NVDEC off NVJPG off VIC off OFA off APE 200 cpu@61.5C soc2@59.25C soc0@58C gpu@62.125C "
    "tj@62.5C soc1@60C VDD_IN 12020mW/11950mW VDD_CPU_GPU_CV 4507mW/4480mW VDD_SOC 2504mW/2500mW",
)
NX = Board(
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
    "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: "
    "Tue Aug  1 19:57:35 UTC 2023",
    15523,
    {"VDD_IN": (4984, 3000), "VDD_CPU_GPU_CV": (4984, 1500), "VDD_SOC": (4984, 600)},
    gpu="17000000.ga10b",
    load="sys/devices/gpu.0/load",
    modes={0: "MAXN", 1: "10W", 2: "15W", 3: "25W"},
    mode=2,
    line="11-26-2026 10:00:01 RAM 4100/15523MB (lfb 900x4MB) SWAP 0/7761MB (cached 0MB) "
    "CPU [3%@729,off,off,0%@729] EMC_FREQ 1%@2133 GR3D_FREQ 18%@306 GR3D2_FREQ 0%@0 VIC_FREQ 729 "
    "APE 174 CV0@-256C CPU@44.5C SOC2@43C SOC0@43.5C CV1@-256C GPU@43.25C tj@44.5C SOC1@42.75C "
    "CV2@-256C VDD_IN 14952mW/14900mW VDD_CPU_GPU_CV 7476mW/7400mW VDD_SOC 2990mW/2990mW",
)
AGX = Board(
    "NVIDIA Jetson AGX Orin Developer Kit",
    "# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: "
    "Mon Jun  1 09:28:48 PM UTC 2026",
    62817,
    {"VDD_GPU_SOC": (20000, 250), "VDD_CPU_CV": (20000, 100), "VIN_SYS_5V0": (5000, 1000)},
    load="sys/devices/platform/bus@0/17000000.gpu/load",
    modes={0: "MAXN", 1: "15W", 2: "30W", 3: "50W"},
    mode=0,
    line="11-26-2026 10:00:01 RAM 20642/62817MB (lfb 1x2MB) CPU [20%@2201,10%@2201] "
    "EMC_FREQ 3%@3199 GR3D_FREQ 55%@[1300,1300] NVENC0 off NVDEC0 off PVA0_FREQ off APE 174 "
    "cpu@52.9C/52.5C soc2@48.4C/48.4C soc0@49.5C/49.5C gpu@57.6C/57C VDD_GPU_SOC "
    "5000mW/5100mW/5200mW VDD_CPU_CV 2000mW/2000mW/2000mW VIN_SYS_5V0 5000mW/5000mW/5000mW",
)
LAPTOP = Board("", "", 16000, {})


class FakeMachine:
    """A folder that stands for `/`; `path` arguments of tests stand for PATH."""

    def __init__(self, root: Path, board: Board) -> None:
        self.root, self.board = root, board
        self.write("proc/meminfo", f"MemTotal: {board.memory * 1024} kB\nMemFree: 100000 kB\n"
                   f"MemAvailable: {board.memory * 1024 * 3 // 4} kB\n")  # fmt: skip
        self.write("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n")
        if board.model:
            self._write_jetson()

    def write(self, name: str, text: str) -> Path:
        """Write a file atomically, because the kernel's files are never half-written."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(text.encode())
        new.replace(path)
        return path

    def _write_jetson(self) -> None:
        board = self.board
        self.write("proc/device-tree/model", board.model + "\0")
        self.write("etc/nv_tegra_release", board.release + "\nTARGET_USERSPACE_LIB_DIR=nvidia\n")
        self.write("var/lib/nvpmodel/status", f"pmode:{board.mode:04d}\n")
        modes = (f"< POWER_MODEL ID={n} NAME={name} >\nGPU MAX_FREQ 1\n"
                 for n, name in board.modes.items())  # fmt: skip
        self.write("etc/nvpmodel.conf", "".join(modes) + "< PM_CONFIG DEFAULT=0 >\n")
        for node in ("nvmap", "nvhost-gpu", "dri/renderD128"):
            self.write(f"dev/{node}", "").chmod(0o660)
        self.gpu(load=970, mhz=1015)
        self.heat({"cpu": 61.5, "gpu": 62.125, "tj": 62.5})
        chip = "sys/class/hwmon/hwmon1"
        self.write(f"{chip}/name", "ina3221\n")
        for number, (name, (volts, amperes)) in enumerate(board.rails.items(), 1):
            self.write(f"{chip}/in{number}_label", f"{name}\n")
            self.write(f"{chip}/in{number}_input", f"{volts}\n")
            self.write(f"{chip}/curr{number}_input", f"{amperes}\n")
        self.write(f"{chip}/in7_label", "sum of shunt voltages\n")
        self.write("sys/class/hwmon/hwmon0/name", "soctherm_oc\n")
        self.over_current(0, 0, 0)

    def gpu(self, load: int, mhz: int) -> None:
        """Set load (thousandths) and clock."""
        self.write(self.board.load, f"{load}\n")
        for name, value in (("cur", mhz), ("min", 306), ("max", 1020)):
            self.write(f"sys/class/devfreq/{self.board.gpu}/{name}_freq", f"{value * 10**6}\n")

    def heat(self, zones: dict[str, float]) -> None:
        """Set the thermal zones, and add one of a sleeping unit, as boards have."""
        for number, (name, value) in enumerate({**zones, "cv0": -256.0}.items()):
            zone = f"sys/class/thermal/thermal_zone{number}"
            self.write(f"{zone}/type", f"{name}-thermal\n")
            self.write(f"{zone}/temp", f"{round(value * 1000)}\n")

    def alert(self, unit: str, state: int) -> None:
        """Set whether the firmware lowers the clocks of a unit."""
        self.write("sys/class/thermal/cooling_device3/type", f"{unit}-throttle-alert\n")
        self.write("sys/class/thermal/cooling_device3/cur_state", f"{state}\n")

    def over_current(self, *counts: int) -> None:
        """Set the counters oc1, oc2, oc3."""
        for number, count in enumerate(counts, 1):
            self.write(f"sys/class/hwmon/hwmon0/oc{number}_event_cnt", f"{count}\n")

    def program(self, name: str, body: str) -> str:
        """Write a shell script as a program; return its folder, for PATH."""
        path = self.write(f"usr/bin/{name}", f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return os.fspath(path.parent)

    def tegrastats(self, *lines: str) -> str:
        """Write a tegrastats that prints these lines and then waits; return its folder."""
        commands = "\n".join(f"echo '{line}'" for line in lines or (self.board.line,))
        return self.program("tegrastats", f"{commands}\nexec sleep 60")
